"""Claims and the commands that make them; imported by nobody."""

from fast_spatial import pipelines  # noqa: F401  (before torchvision: see pipelines/nvjpeg.py)
