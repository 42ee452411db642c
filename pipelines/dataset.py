"""From a folder to an index of images: paths, labels, classes, validated before anything is started.

The layout is the usual one, `DATA/train/<class>/*` and `DATA/val/<class>/*`, and means what torchvision's ImageFolder
means by it: classes are the sorted folder names, images the files with an image's extension.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.sampling import TRAINING, epoch_order, pack_key

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's IMG_EXTENSIONS
_SUBSET_SEED = 2**31 - 1

FLAT_VAL_FIX = (
    "put ILSVRC2012_devkit_t12.tar.gz into {data} and sort it into class folders with\n"
    "  python -c \"from torchvision.datasets.imagenet import *; r = '{data}'; parse_devkit_archive(r); "
    "v = r + '/val/'; "
    "[os.renames(v + f, v + c + '/' + f) for f, c in zip(sorted(os.listdir(v)), load_meta_file(r)[1])]\""
)


@dataclass(frozen=True)
class ImageIndex:
    """The images of one split.

    Attributes:
        root: the split's folder.
        paths: uint8 [N, W], absolute paths padded with NUL.
        labels: int64 [N], positions in `classes`.
        classes: the class folders' names, sorted.

    """

    root: Path
    paths: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, position: int) -> str:
        """The absolute path of one image."""
        return os.fsdecode(self.paths[position].tobytes().rstrip(b"\0"))

    def relative_path(self, position: int) -> str:
        """The path of one image, relative to the split's folder's parent ("val/n01440764/x.JPEG")."""
        return os.path.relpath(self.path(position), self.root.parent)

    def positions_of(self, relative_paths: Collection[str]) -> NDArray[np.int64]:
        """The positions of images named as by `relative_path`, in the split's order; others are left away."""
        names = [os.fsencode(os.path.join(self.root.parent, path)) for path in relative_paths]
        return np.flatnonzero(np.isin(self.paths.view(f"S{self.paths.shape[1]}")[:, 0], names))

    def fingerprint(self) -> str:
        """A digest of which images these are, by relative path and label: equal wherever the folder lies."""
        names = self.paths[:, len(os.fsencode(self.root)) + 1 :]
        digest = hashlib.sha256(str(names.shape).encode())
        digest.update(names.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def first_classes(self, count: int) -> ImageIndex:
        """The images of the first `count` classes only."""
        if not 1 <= count <= len(self.classes):
            raise ValueError(f"classes is {count}: {self.root} has {len(self.classes)} classes")
        return replace(self._take(np.flatnonzero(self.labels < count)), classes=self.classes[:count])

    def random_subset(self, count: int) -> ImageIndex:
        """A fixed pseudo-random subset of at most `count` images, in the split's order."""
        if count < 1:
            raise ValueError(f"cannot keep {count} images of {self.root}: at least 1 is needed")
        return self._take(np.sort(epoch_order(pack_key(TRAINING, _SUBSET_SEED), 0, len(self))[:count]))

    def _take(self, positions: NDArray[np.int64]) -> ImageIndex:
        return replace(self, paths=self.paths[positions], labels=self.labels[positions])


def list_classes(data: Path, split: str) -> list[str]:
    """The sorted class folders of a split.

    Raises:
        ValueError: naming what is wrong with the layout, and the line that fixes a flat validation folder.

    """
    root = data / split
    if not data.is_dir():
        raise ValueError(
            f"--data {data}: there is no such folder; give the folder that holds train/ and val/, or digits"
        )
    if not root.is_dir():
        found = ", ".join(sorted(entry.name for entry in os.scandir(data))[:4]) or "nothing"
        raise ValueError(f"--data {data}: it has no {split}/ (it holds {found}); expected {root}/<class>/<image>")
    classes, files = [], 0
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir():
                classes.append(entry.name)
            else:
                files += entry.name.lower().endswith(EXTENSIONS)
    if not classes and files:
        fix = FLAT_VAL_FIX.format(data=data.resolve()) if split == "val" else f"sort them into {root}/<class>/"
        raise ValueError(f"--data {data}: {root} holds {files} images but no class folders; {fix}")
    if not classes:
        raise ValueError(f"--data {data}: {root} is empty; expected {root}/<class>/<image>")
    return sorted(classes)


def check_classes_agree(data: Path) -> list[str]:
    """The classes of `data`, the same in train/ and val/.

    Raises:
        ValueError: naming the first classes that only one of them has.

    """
    train, val = list_classes(data, "train"), list_classes(data, "val")
    if train != val:
        only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
        raise ValueError(
            f"--data {data}: train/ and val/ have different classes (only in train: {some(only_train)}; only in val: "
            f"{some(only_val)}); labels would not mean the same, make the folders agree"
        )
    return train


def check_not_empty(data: Path, split: str, classes: list[str]) -> None:
    """Raise a ValueError that names the first class folder without an image."""
    for name in classes:
        if next(iter(_images_below(data / split / name)), None) is None:
            raise _empty(data, data / split / name)


def count_images(data: Path, split: str, classes: list[str], *, at_most: int) -> int:
    """How many images there are in these class folders; stops counting at a number."""
    images = (image for name in classes for image in _images_below(data / split / name))
    return sum(1 for _ in islice(images, at_most))


def _empty(data: Path, folder: Path) -> ValueError:
    return ValueError(f"--data {data}: the class folder {folder} holds no images; fill or remove it")


def check_divides(global_batch_size: int, world_size: int) -> None:
    """Raise a ValueError unless every process gets the same number of images of a global batch."""
    if global_batch_size % world_size:
        below = [n for n in range(1, world_size) if global_batch_size % n == 0][-1]
        above = -(-global_batch_size // world_size) * world_size
        raise ValueError(
            f"--global-batch-size {global_batch_size} does not divide among {world_size} processes; use {below} "
            f"processes, or --global-batch-size {above}"
        )


def read_index(data: Path, split: str) -> ImageIndex:
    """The index of `data/split`.

    Raises:
        ValueError: on a layout that is not one folder per class, or a class without images.

    """
    root = (data / split).absolute()
    classes = list_classes(data, split)
    names: list[bytes] = []
    counts = []
    for name in classes:
        found = sorted(_images_below(root / name), key=os.path.split)
        if not found:
            raise _empty(data, root / name)
        names += found
        counts.append(len(found))
    longest = max(map(len, names))
    paths = np.array(names, dtype=f"S{longest + 1}").view(np.uint8).reshape(len(names), longest + 1)
    return ImageIndex(root, paths, np.repeat(np.arange(len(classes)), counts), tuple(classes))


def _images_below(folder: Path) -> Iterator[bytes]:
    for where, _, files in os.walk(folder, followlinks=True):
        for file in files:
            if file.lower().endswith(EXTENSIONS):
                yield os.fsencode(os.path.join(where, file))


def some(names: list[str]) -> str:
    """The first names of a list, whatever they hold, for one line of a message."""
    first = ["".join(char if char.isprintable() else "?" for char in name[:100]) for name in names[:3]]
    return ", ".join(first or ["none"]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
