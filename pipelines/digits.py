"""The digits data set: scikit-learn's handwritten digits, exported once as a folder of JPEG files.

1,797 real images of 8x8 pixels (part of the UCI data set "Optical Recognition of Handwritten Digits"), enlarged and
split into 1,497 for training and 300 for validation. Training takes minutes and shows the trend of ImageNet's table.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from fast_spatial.kernels.host import cache_folder

TRAIN_IMAGES = 1497
SIDE = 64
_VERSION = "digits-v2"
_SPLIT_SEED = 0


def export_digits(folder: Path | None = None) -> Path:
    """Write the digits as `folder/{train,val}/{0..9}/NNNN.jpg` unless the folder exists; atomic. Returns the folder."""
    folder = folder or cache_folder() / _VERSION
    if folder.is_dir():
        return folder
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.Generator(np.random.Philox(_SPLIT_SEED)).permutation(len(digits.images))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".digits-") as temporary:
        made = Path(temporary) / folder.name
        for rank, number in enumerate(order):
            target = made / ("train" if rank < TRAIN_IMAGES else "val") / str(digits.target[number])
            target.mkdir(parents=True, exist_ok=True)
            grey = np.rint(digits.images[number] * (255 / 16)).astype(np.uint8)
            image = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
            image.save(target / f"{number:04d}.jpg", quality=95)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process made it meanwhile
                raise
    return folder
