"""Training images that cannot be decoded: replaced where that was asked for, counted, and remembered by the run."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from fast_spatial.errors import UserError
from fast_spatial.pipelines.dataset import ImageIndex
from fast_spatial.pipelines.loader import undecodable
from fast_spatial.pipelines.text import printable, some
from fast_spatial.runtime.files import write_atomically
from fast_spatial.runtime.run_files import BAD_IMAGES, DAMAGED_IMAGES
from fast_spatial.runtime.runlog import say

# Images of which no part can be decoded, and those of which some part cannot.


class BadImages:
    """The images of a run that cannot be decoded, as all its processes have met them.

    Every process keeps lists of its own, which --exclude reads, too. None has to know what the others met: whether an
    image is replaced, and by which, does not depend on when that was found.

    Args:
        out: the run's folder.
        rank: the GLOBAL rank.
        images: the split that is trained on.
        skip: whether they are replaced; otherwise the first ones end the run.
        at_most: more than so many end the run in any case.

    """

    def __init__(self, out: Path, rank: int, images: ImageIndex, *, skip: bool, at_most: int) -> None:
        self._out, self._rank, self._images = out, rank, images
        self._skip, self._at_most = skip, at_most

    def positions(self) -> list[int]:
        """The positions of images of which no part can be decoded, as far as they were met.

        Raises:
            UserError: if there are some, and they are not to be skipped, or are too many.

        """
        paths = self.paths()
        if paths and not self._skip:
            raise UserError(
                f"--on-bad-image stop: so far, this run has replaced {len(paths)} images that cannot be decoded "
                f"({some(paths)})",
                "add --on-bad-image skip, or name a new folder",
            )
        self._check_number(paths)
        return self._images.positions_of(self._listed(BAD_IMAGES)).tolist()  # type: ignore[no-any-return]

    def paths(self) -> list[str]:
        """The paths of all that were met so far, relative to the data folder, sorted."""
        return sorted(self._listed(BAD_IMAGES) | self._listed(DAMAGED_IMAGES))

    def met(self, reasons: dict[int, str], hopeless: Collection[int]) -> None:
        """Remember images, by position in the split, that cannot be decoded, and why; `hopeless`: no part of them.

        Raises:
            UserError: if they are not to be skipped, or are too many.

        """
        if not self._skip:
            raise undecodable(self._images, reasons, "; or give the same command with --on-bad-image skip")
        found = {self._images.relative_path(position): (position, reason) for position, reason in reasons.items()}
        known = self.paths()
        self._check_number({*known, *found})
        for path, (position, reason) in found.items():
            name = (BAD_IMAGES if position in hopeless else DAMAGED_IMAGES).format(self._rank)
            if path in self._listed(name):
                continue
            before = (self._out / name).read_bytes() if (self._out / name).is_file() else b""
            line = os.fsencode(f"# {reason}\n{path}\n")
            write_atomically(self._out / name, lambda file, text=before + line: file.write(text))  # type: ignore[misc]
            say(f"{printable(path)} is replaced by another image: {reason}")

    def _listed(self, pattern: str) -> set[str]:
        lists = [os.fsdecode(path.read_bytes()) for path in self._out.glob(pattern.format("*"))]
        return {line for text in lists for line in text.split("\n") if line and not line.startswith("#")}

    def _check_number(self, paths: Collection[str]) -> None:
        if len(paths) > self._at_most:
            raise UserError(
                f"--max-bad-images {self._at_most}: {len(paths)} images cannot be decoded: {some(sorted(paths))}",
                f"look at the disk and the folder with launch.py check-data --data {self._images.root.parent}",
            )
