"""Claims and the commands that make them; imported by nobody."""

import pipelines  # noqa: F401  (before torchvision: see pipelines/nvjpeg.py)
