"""Train and judge image classifiers under rotations and translations."""

import pipelines  # noqa: F401  (before torchvision: see pipelines/nvjpeg.py)
