"""A cached folder of synthetic JPEG files with ImageNet's sizes and the statistics of photographs.

Amplitudes fall with frequency, as in natural images, and chroma is weaker than luma. The JPEG quality is chosen for
files of about 110 kB, ImageNet's mean, because decoding time depends on the file size.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fast_spatial.kernels.host import cache_folder, usable_cpus

SIZES = ((500, 375), (375, 500), (500, 333), (500, 400))  # width, height
CLASSES, PER_CLASS = 8, {"train": 64, "val": 8}
FILE_BYTES = 110_000
_DONE = "complete"


def synthetic_images() -> Path:
    """The folder, with `train/` and `val/` of the same 8 classes; made in the cache folder on first use."""
    folder = cache_folder() / "synthetic-v1"
    make_images(folder, CLASSES, PER_CLASS)
    return folder


def make_images(folder: Path, classes: int, per_class: dict[str, int], links: int = 0) -> None:
    """Make a folder of images on all cores, unless it is complete.

    Args:
        folder: parent of `train/` and `val/`.
        classes: number of class folders per split.
        per_class: images per class, by split.
        links: additional symbolic links to each training image, for longer epochs. From the page cache, a link costs as
            much as a file.

    """
    if (folder / _DONE).is_file():
        return
    names = [
        folder / split / f"class_{label}" / f"{number:03}.jpg"
        for split, count in per_class.items()
        for label in range(classes)
        for number in range(count)
    ]
    print(f"making {len(names)} synthetic JPEG files in {folder}", flush=True)
    # Processes, since threads would wait for the GIL; subprocesses, which import only this module.
    count = min(usable_cpus(), len(names))
    shares = [[(str(name), seed) for seed, name in enumerate(names)][first::count] for first in range(count)]
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "benchmarks.jpegs"]
    workers = [subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, text=True) for _ in shares]
    for worker, share in zip(workers, shares):
        assert worker.stdin is not None
        json.dump(share, worker.stdin)
        worker.stdin.close()
    statuses = [worker.wait() for worker in workers]
    if any(statuses):
        raise RuntimeError(f"making images in {folder} failed; see the message above")
    for name in names:
        if name.parent.parent.name == "train":
            for copy in range(links):
                link = name.with_name(f"{name.stem}_{copy:03}.jpg")
                link.unlink(missing_ok=True)
                link.symlink_to(name.name)
    (folder / _DONE).touch()


def photograph(seed: int) -> NDArray[np.uint8]:
    """Noise with a photograph's spectrum and a few flat, sharp-edged shapes: uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    width, height = SIZES[seed % len(SIZES)]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    fall = 1 / np.maximum(frequency, 1.0)
    planes = []
    for strength in (50.0, 15.0, 15.0):
        spectrum = fall * np.exp(2j * np.pi * rng.random(frequency.shape))
        plane = np.fft.irfft2(spectrum, (height, width))
        planes.append(strength * plane / plane.std())
    luma, blue, red = planes
    rows, columns = np.mgrid[:height, :width]
    for _ in range(12):
        y, x, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(10, 80)
        luma += rng.uniform(-40, 40) * (np.hypot(rows - y, columns - x) < radius)
    luma += rng.normal(0, 2.0, luma.shape)  # the sensor's noise
    pixels = np.stack([luma + red, luma - 0.5 * red - 0.2 * blue, luma + blue], axis=-1) + 118
    return pixels.clip(0, 255).astype(np.uint8)


def write_photograph(path: Path, seed: int) -> None:
    """Write a synthetic photograph as a JPEG file of ImageNet's mean size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(photograph(seed))
    low, high = 50, 99
    while low < high:  # binary search for the highest quality within FILE_BYTES
        quality = (low + high + 1) // 2
        low, high = (quality, high) if len(_encode(image, quality)) <= FILE_BYTES else (low, quality - 1)
    path.write_bytes(_encode(image, low))


def _encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


if __name__ == "__main__":
    for name, seed in json.load(sys.stdin):
        write_photograph(Path(name), seed)
