"""Images of `--data`: a folder, or the digits."""

from __future__ import annotations

from pathlib import Path

from fast_spatial.config.modes import DIGITS
from fast_spatial.pipelines.dataset import ImageIndex, read_index
from fast_spatial.pipelines.digits import export_digits


def data_folder(data: str) -> Path:
    """The folder of `--data`; the digits are exported on first use."""
    return export_digits() if data == DIGITS else Path(data)


def load_split(data: str, split: str, *, exclude: str = "", classes: int = 0, max_images: int = 0) -> ImageIndex:
    """The index of a split without the images of `--exclude`, cut to the first classes and a fixed random subset."""
    images = read_index(data_folder(data), split)
    if exclude:
        images = images.without(Path(exclude))
    if classes:
        images = images.first_classes(classes)
    return images.random_subset(max_images) if max_images else images
