"""Index a folder of images: paths, labels and classes, validated before any process starts.

The layout is `DATA/train/<class>/*` and `DATA/val/<class>/*`, read as torchvision's ImageFolder reads it. Classes are
the sorted folder names. Images are the files with an image extension.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fast_spatial.errors import UserError
from fast_spatial.kernels.sampling import TRAINING, epoch_order, pack_key
from fast_spatial.pipelines.folder import EXTENSIONS, SPLITS
from fast_spatial.pipelines.text import some

_SUBSET_SEED = 2**31 - 1

FLAT_VAL_FIX = (
    "python -c \"from torchvision.datasets.imagenet import *; r = '{data}'; parse_devkit_archive(r); "
    "v = r + '/val/'; "
    "[os.renames(v + f, v + c + '/' + f) for f, c in zip(sorted(os.listdir(v)), load_meta_file(r)[1])]\""
)


class LeftOut(NamedTuple):
    """Images of a split excluded by an exclusion file, and the number of paths in it that do not exist."""

    names: tuple[str, ...] = ()
    gone: int = 0


_NOTHING = LeftOut()


@dataclass(frozen=True)
class ImageIndex:
    """The images of one split.

    Attributes:
        root: the split's folder.
        paths: uint8 [N, W], absolute paths padded with NUL.
        labels: int64 [N], positions in `classes`.
        classes: the class folders' names, sorted.
        left_out: the images excluded by `without`.

    """

    root: Path
    paths: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    left_out: LeftOut = _NOTHING

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, position: int) -> str:
        """The absolute path of one image."""
        return os.fsdecode(self.paths[position].tobytes().rstrip(b"\0"))

    def relative_path(self, position: int) -> str:
        """The path of one image, relative to the split's folder's parent ("val/n01440764/x.JPEG")."""
        return os.path.relpath(self.path(position), self.root.parent)

    def positions_of(self, relative_paths: Collection[str]) -> NDArray[np.int64]:
        """Positions of images named as by `relative_path`, int64, ascending; unknown names are ignored."""
        names = [os.fsencode(os.path.join(self.root.parent, path)) for path in relative_paths]
        return np.flatnonzero(np.isin(self.paths.view(f"S{self.paths.shape[1]}")[:, 0], names))

    def fingerprint(self) -> str:
        """A digest of the images' relative paths and labels, independent of the folder's location."""
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

    def balanced_subset(self, per_class: int) -> ImageIndex:
        """A fixed pseudo-random subset with `per_class` images of every non-empty class, in the split's order.

        Raises:
            ValueError: if a class has fewer images.

        """
        return self._take(np.sort(self.balanced_positions(per_class)))

    def balanced_order(self) -> NDArray[np.int64]:
        """All positions, int64 [N], in rounds: each round holds the next image of every class, in a fixed random order.

        Classes without further images are absent from later rounds.
        """
        order = epoch_order(pack_key(TRAINING, _SUBSET_SEED), 0, len(self))
        by_class = order[np.argsort(self.labels[order], kind="stable")]
        rounds = np.concatenate([np.arange(count) for count in self.class_counts()])
        return by_class[np.argsort(rounds, kind="stable")]

    def balanced_positions(self, per_class: int) -> NDArray[np.int64]:
        """Positions of `balanced_subset`: the first `per_class` rounds of `balanced_order`.

        Raises:
            ValueError: if a class has fewer images.

        """
        counts = self.class_counts()
        if per_class > counts.min():
            label = np.unique(self.labels)[counts.argmin()]
            name = Path(self.relative_path(int(np.argmax(self.labels == label)))).parts[1]
            raise ValueError(f"{self.root} holds only {counts.min()} images of class {name}")
        return self.balanced_order()[: per_class * len(counts)]

    def balanced_rounds(self, positions: Collection[int]) -> int:
        """The largest `per_class` whose `balanced_positions` are all in `positions`."""
        counts = self.class_counts()
        held = np.isin(self.balanced_positions(int(counts.min())), list(positions))
        return int(held.reshape(-1, len(counts)).all(axis=1).cumprod().sum())

    def class_counts(self) -> NDArray[np.int64]:
        """Number of images of every non-empty class, int64, by ascending label."""
        return np.unique(self.labels, return_counts=True)[1]

    def without(self, listing: Path) -> ImageIndex:
        """The images that are not named in an exclusion file.

        The file names one image per line, relative to the data folder ("train/n01440764/x.JPEG"). Lines that start with
        # are comments. The remaining images get new positions, and so new draws in the random stream.

        Raises:
            UserError: if a line names an existing file that is not an image of the split, or a class becomes empty.

        """
        wanted = [line for line in read_exclusions(listing) if line.startswith(f"{self.root.name}/")]
        if not wanted:
            return self
        positions = self.positions_of(wanted)
        left_out = [self.relative_path(position) for position in positions.tolist()]
        unknown = sorted(set(wanted) - set(left_out))
        for line in unknown:
            if os.path.lexists(self.root.parent / line):
                raise UserError(
                    f"--exclude {listing}: {line} exists but is not an image of {self.root}",
                    f"use paths such as {self.relative_path(0)}",
                )
        kept = self._take(np.delete(np.arange(len(self)), positions))
        emptied = np.setdiff1d(self.labels, kept.labels)
        if len(emptied):
            raise UserError(
                f"--exclude {listing}: class {self.classes[emptied[0]]} of {self.root} would have no images",
                "keep at least one, or remove the class from both train/ and val/",
            )
        return replace(kept, left_out=LeftOut(tuple(left_out), len(unknown)))

    def describe_left_out(self) -> str:
        """A sentence on the excluded images; "" if there are none."""
        names, gone = self.left_out
        if not names and not gone:
            return ""
        also = f"; {gone} more listed paths do not exist" if gone else ""
        return f"{self.root.name}: {len(names)} images excluded by --exclude: {some(list(names))}{also}"

    def _take(self, positions: NDArray[np.int64]) -> ImageIndex:
        return replace(self, paths=self.paths[positions], labels=self.labels[positions])


def list_classes(data: Path, split: str) -> list[str]:
    """The sorted class folders of a split.

    Raises:
        UserError: on a wrong layout. For a flat validation folder, the advice is a command that sorts it.

    """
    root = data / split
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder", "give the folder that contains train/ and val/, or digits")
    if not root.is_dir():
        found = ", ".join(sorted(entry.name for entry in os.scandir(data))[:4]) or "nothing"
        raise UserError(f"--data {data}: no folder {split}/ in it (found: {found})", f"expected {root}/<class>/<image>")
    try:
        entries = list(os.scandir(root))
    except OSError as error:
        raise UserError(f"--data {data}: cannot read {root} ({error.strerror})", "check its permissions") from None
    classes = [entry.name for entry in entries if entry.is_dir()]
    files = sum(is_image(entry.name) for entry in entries if not entry.is_dir())
    if not classes and files:
        what = f"--data {data}: {root} contains {files} images but no class folders"
        if split == "train":
            raise UserError(what, f"sort them into {root}/<class>/")
        need = f"put ILSVRC2012_devkit_t12.tar.gz into {data.resolve()} and sort them with this command"
        raise UserError(f"{what}; {need}", FLAT_VAL_FIX.format(data=data.resolve()))
    if not classes:
        raise UserError(f"--data {data}: {root} is empty", f"expected {root}/<class>/<image>")
    return sorted(classes)


def read_exclusions(listing: Path) -> list[str]:
    """The distinct paths in an exclusion file, in its order.

    Raises:
        UserError: if it cannot be read, or names a path outside train/ and val/.

    """
    try:
        lines = listing.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    except OSError as error:
        raise UserError(
            f"--exclude {listing}: cannot read the file ({error.strerror})",
            "give a file with one path per line, as `check-data --write-exclusions FILE` writes it",
        ) from None
    names = [line.rstrip("\r") for line in lines]
    names = [name for name in names if name.strip() and not name.startswith("#")]
    for name in names:
        if name.partition("/")[0] not in SPLITS:
            raise UserError(
                f"--exclude {listing}: {name} is not in train/ or val/",
                "use paths relative to the data folder, such as train/n01440764/n01440764_18.JPEG",
            )
    return list(dict.fromkeys(names))


def check_classes_agree(data: Path) -> list[str]:
    """The classes of `data`, checked to be the same in train/ and val/.

    Raises:
        UserError: naming the first classes that exist in only one of them.

    """
    train, val = list_classes(data, "train"), list_classes(data, "val")
    if train != val:
        only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
        raise UserError(
            f"--data {data}: train/ and val/ have different classes (only in train: {some(only_train)}; only in val: "
            f"{some(only_val)}), so labels would not match",
            "use the same class folders in both",
        )
    return train


def check_not_empty(data: Path, split: str, classes: list[str]) -> None:
    """Raise a UserError that names the first class folder without an image."""
    for name in classes:
        if next(iter(_images_below(data / split / name)), None) is None:
            raise _empty(data, data / split / name)


def count_images(data: Path, split: str, classes: list[str], *, at_most: int) -> int:
    """Number of images in these class folders; counting stops at `at_most`."""
    images = (image for name in classes for image in _images_below(data / split / name))
    return sum(1 for _ in islice(images, at_most))


def _empty(data: Path, folder: Path) -> UserError:
    return UserError(f"--data {data}: class folder {folder} contains no images", "add images, or remove the folder")


def check_divides(global_batch_size: int, world_size: int) -> None:
    """Raise a UserError unless the number of processes divides the global batch size."""
    if global_batch_size % world_size:
        below = [n for n in range(1, world_size) if global_batch_size % n == 0][-1]
        above = -(-global_batch_size // world_size) * world_size
        raise UserError(
            f"--global-batch-size {global_batch_size}: not divisible by {world_size} processes",
            f"use {below} process{'es' * (below > 1)}, or --global-batch-size {above}",
        )


def read_index(data: Path, split: str) -> ImageIndex:
    """The index of `data/split`.

    Raises:
        UserError: on a layout that is not one folder per class, or a class without images.

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
    return (os.fsencode(path) for path in files_below(folder, _refuse) if is_image(path))


def is_image(path: str) -> bool:
    """Whether a file name has an image extension."""
    return path.lower().endswith(EXTENSIONS)


def files_below(folder: Path, refuse: Callable[[str, str], None]) -> Iterator[str]:
    """Paths of all files below a folder; symbolic links are followed.

    `refuse` is called with (folder, reason) for each folder that is unreadable, or a symbolic link to a folder above it
    (a loop).
    """

    def unreadable(error: OSError) -> None:
        refuse(str(error.filename), error.strerror or str(error))

    for where, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        for name in list(folders):
            link = os.path.join(where, name)
            if os.path.islink(link) and _holds(link, where):
                folders.remove(name)
                refuse(link, "symbolic link loop")
        yield from (os.path.join(where, file) for file in files)


def _holds(folder: str, other: str) -> bool:
    real = os.path.realpath(folder)
    return os.path.commonpath([real, os.path.realpath(other)]) == real


def _refuse(folder: str, why: str) -> None:
    raise UserError(f"--data: cannot read {folder}: {why}", "fix or remove it")
