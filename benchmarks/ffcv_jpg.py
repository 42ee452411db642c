"""FFCV's loader of JPEG files, for another Python than this project's: answers words on its standard input in JSON.

    PYTHON ffcv_jpg.py FOLDER SIDE BATCH THREADS

Needs FFCV alone: Python 3.11 with numba 0.60 and NumPy below 2, OpenCV's and libjpeg-turbo's headers to build it.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write(folder: Path, target: Path, threads: int) -> None:
    """Pack the folder's JPEG files as they are."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    fields = {"image": RGBImageField(write_mode="jpg", max_resolution=512, jpeg_quality=90), "label": IntField()}
    writer = DatasetWriter(str(target), fields, num_workers=threads)
    writer.from_indexed_dataset(ImageFolder(str(folder)))


def batches(target: Path, side: int, batch: int, threads: int) -> Iterator[Any]:
    """Endless batches of cropped, flipped images."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    pipeline = [RandomResizedCropRGBImageDecoder((side, side)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    loader = Loader(
        str(target),
        batch_size=batch,
        num_workers=threads,
        order=OrderOption.QUASI_RANDOM,
        drop_last=True,
        os_cache=True,
        pipelines={"image": pipeline, "label": None},
    )
    for _ in itertools.count():
        yield from loader


def main(folder: str, side: str, batch: str, threads: str) -> None:
    """Answer `about` and `batch` until the input ends."""
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "images.beton"
        write(Path(folder) / "train", target, int(threads))
        endless = batches(target, int(side), int(batch), int(threads))
        for line in sys.stdin:
            if line.strip() == "about":
                answer: dict[str, Any] = {"version": version("ffcv")}
            else:
                answer = {"images": len(next(endless)[0])}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
