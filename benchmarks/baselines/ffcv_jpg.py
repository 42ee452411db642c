"""FFCV's loader of JPEG files, for a separate Python environment. Answers words on standard input in JSON.

    PYTHON ffcv_jpg.py FOLDER SIDE BATCH THREADS

Needs only FFCV: Python 3.11, numba 0.60, NumPy below 2, and the headers of OpenCV and libjpeg-turbo to build it.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write(folder: Path, target: Path, threads: int) -> int:
    """Pack the folder's images as JPEG of quality 90, which FFCV encodes again; returns their number."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    writer = DatasetWriter(str(target), fields, num_workers=threads)
    images = ImageFolder(str(folder))
    writer.from_indexed_dataset(images)
    return len(images)


def batches(target: Path, count: int, side: int, batch: int, threads: int) -> Iterator[Any]:
    """Endless batches of cropped, flipped images."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    pipeline = [RandomResizedCropRGBImageDecoder((side, side)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    # A very long epoch: on few images, threads would wait for one another at the end of each epoch.
    indices = list(range(count)) * max(1, 500_000 // count)
    loader = Loader(
        str(target),
        indices=indices,
        batch_size=batch,
        num_workers=threads,
        order=OrderOption.RANDOM,
        drop_last=True,
        os_cache=True,
        pipelines={"image": pipeline, "label": None},
    )
    for _ in itertools.count():
        yield from loader


def main(folder: str, side: str, batch: str, threads: str) -> None:
    """Answer the words `about` and `batch` until the input ends."""
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "images.beton"
        count = write(Path(folder) / "train", target, int(threads))
        endless = batches(target, count, int(side), int(batch), int(threads))
        for line in sys.stdin:
            if line.strip() == "about":
                answer: dict[str, Any] = {"version": version("ffcv"), "bytes_per_image": target.stat().st_size // count}
            else:
                answer = {"images": len(next(endless)[0])}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
