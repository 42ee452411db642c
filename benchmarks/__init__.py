"""The project's claims, and the commands that measure them. No other package imports this one."""

from fast_spatial import pipelines  # noqa: F401  (before torchvision: see pipelines/nvjpeg.py)
