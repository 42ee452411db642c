"""JPEG files that expose a faulty decoder, and the tolerance for its pixels.

Every image has stripes in both directions, with individual periods and phases, flat boxes, and slowly varying colours.
An image that is shifted by one pixel, partly black, or swapped with another one is far outside the tolerance. Colours
vary slowly, because decoders upsample subsampled chroma in different ways; photographs hardly show this either.
"""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Tolerance per image: mean difference, and share of pixels that differ by more than FAR, both in units of 1/255.
MOST_MEAN = 2.0
FAR = 16
MOST_FAR_SHARE = 0.01

_ORIENTATION = 0x0112  # EXIF's tag
_QUALITY = 92
# (height, width) of most images; _LARGE: of the others.
_SIZES = (
    (375, 500),
    (33, 47),
    (97, 131),
    (64, 64),
    (227, 301),
    (480, 360),
    (129, 255),
    (201, 77),
    (256, 341),
    (57, 190),
)
_LARGE = ((1201, 1601), (1501, 1001))
_KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("4:2:0", {"subsampling": 2}),
    ("4:2:2", {"subsampling": 1}),
    ("4:4:4", {"subsampling": 0}),
    ("progressive 4:2:0", {"subsampling": 2, "progressive": True}),
    ("progressive 4:4:4", {"subsampling": 0, "progressive": True}),
    ("grey", {"mode": "L"}),
    ("CMYK", {"mode": "CMYK"}),
    ("EXIF-rotated 4:2:0", {"subsampling": 2, "orientation": 6}),
    ("EXIF-mirrored 4:2:2", {"subsampling": 1, "orientation": 2}),
    ("optimized 4:2:0", {"subsampling": 2, "optimize": True}),
)
COUNT = 3 * len(_KINDS)


class Specimen(NamedTuple):
    """A JPEG file: kind, bytes, and size in pixels."""

    kind: str
    content: bytes
    height: int
    width: int

    @property
    def name(self) -> str:
        """Kind and size."""
        return f"{self.kind}, {self.width} x {self.height}"


class Region(NamedTuple):
    """Rows [y, y + height) and columns [x, x + width) of the specimen at an index."""

    specimen: int
    y: int
    x: int
    height: int
    width: int


class Difference(NamedTuple):
    """Mean absolute difference of two images, in 1/255, and the share of pixels with a channel off by over 16/255."""

    mean: float
    far_share: float

    def or_worse(self, other: Difference) -> Difference:
        """Field-wise maximum of two differences."""
        return Difference(max(self.mean, other.mean), max(self.far_share, other.far_share))

    @property
    def is_right(self) -> bool:
        """Whether the difference is within tolerance."""
        return self.mean <= MOST_MEAN and self.far_share <= MOST_FAR_SHARE


def picture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Pixels, uint8 [H, W, 3], of an image that is unique to its seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    wave = np.zeros((height, width))
    for along, amplitude in ((x, 34), (y, 34), (x + y, 14), (x - y, 14)):
        wave += amplitude * np.sin(2 * np.pi * (along / rng.uniform(7, 13) + rng.uniform()))
    for _ in range(6):
        top, left = int(rng.integers(height)), int(rng.integers(width))
        wave[top : top + height // 6, left : left + width // 6] *= 0.4
    tone = rng.uniform(-20, 20) * (x / width - 0.5) + rng.uniform(-20, 20) * (y / height - 0.5)
    colours = [
        24 * np.sin(2 * np.pi * (x / rng.uniform(90, 150) + y / rng.uniform(90, 150) + rng.uniform())) for _ in range(3)
    ]
    noise = rng.normal(0, 3, (height, width))
    return np.stack([128 + wave + tone + noise + colour for colour in colours], axis=2).clip(0, 255).astype(np.uint8)


def specimens() -> list[Specimen]:
    """All files: each kind in three sizes. Only the JPEG encoder may differ between machines."""
    made = []
    for number in range(COUNT):
        kind, options = _KINDS[number % len(_KINDS)]
        height, width = _SIZES[(number + number // len(_KINDS)) % len(_SIZES)]
        if number % len(_KINDS) in (0, 3) and number >= 2 * len(_KINDS):
            height, width = _LARGE[number % 2]
        content = _encode(picture(number, height, width), **options)
        made.append(Specimen(kind, content, height, width))
    return made


def _encode(pixels: NDArray[np.uint8], *, mode: str = "RGB", orientation: int = 0, **options: Any) -> bytes:
    exif = Image.Exif()
    if orientation:
        exif[_ORIENTATION] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG", quality=_QUALITY, exif=exif, **options)
    return file.getvalue()


def batches(files: list[Specimen], *, full: int, count: int) -> list[list[Region]]:
    """Batches of regions: one batch per file with a single region, then `count` batches of `full` random regions.

    Each of the latter holds one whole image.
    """
    rng = np.random.default_rng(0)
    single = [[_region(rng, index, file)] for index, file in enumerate(files)]
    many = []
    for number in range(count):
        order = np.concatenate([rng.permutation(len(files)) for _ in range(full // len(files) + 1)])[:full]
        batch = [_region(rng, int(index), files[index]) for index in order]
        whole = files[order[number]]
        batch[number] = Region(int(order[number]), 0, 0, whole.height, whole.width)
        many.append(batch)
    return single + many


def _region(rng: np.random.Generator, index: int, file: Specimen) -> Region:
    """A region with odd offsets, at least 24 pixels a side, and an area as RandomResizedCrop draws it."""
    share = np.sqrt(rng.uniform(0.1, 0.9))
    height, width = (min(max(24, int(side * share)), side - 1) for side in (file.height, file.width))
    y, x = (
        2 * int(rng.integers((side - size + 1) // 2)) + 1 for side, size in ((file.height, height), (file.width, width))
    )
    return Region(index, min(y, file.height - height), min(x, file.width - width), height, width)


def difference(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> Difference:
    """Difference of two images, uint8 [H, W, 3]; the maximum if their shapes differ."""
    if found.shape != expected.shape:
        return Difference(255.0, 1.0)
    apart = np.maximum(found, expected) - np.minimum(found, expected)
    largest = np.maximum(np.maximum(apart[..., 0], apart[..., 1]), apart[..., 2])
    return Difference(float(apart.mean()), float((largest > FAR).mean()))
