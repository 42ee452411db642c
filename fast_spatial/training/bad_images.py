"""Undecodable training images: replaced if --on-bad-image allows it, counted, and listed in the run's folder."""

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


class BadImages:
    """The bad images of a run: those that cannot be decoded, in whole or in part.

    Each process writes lists of its own, in the format of --exclude. Processes do not exchange them: whether an image
    is replaced, and by which one, does not depend on when it was found.

    Args:
        out: the run's folder.
        rank: the GLOBAL rank.
        images: the training split.
        skip: replace bad images; otherwise the first one ends the run.
        at_most: maximum number of bad images; more end the run in any case.

    """

    def __init__(self, out: Path, rank: int, images: ImageIndex, *, skip: bool, at_most: int) -> None:
        self._out, self._rank, self._images = out, rank, images
        self._skip, self._at_most = skip, at_most

    def positions(self) -> list[int]:
        """Positions in the split of the images found so far that have no decodable part.

        Raises:
            UserError: if bad images were found and `skip` is off, or if there are too many.

        """
        paths = self.paths()
        if paths and not self._skip:
            raise UserError(
                f"--on-bad-image stop: this run has already replaced {len(paths)} undecodable images ({some(paths)})",
                "add --on-bad-image skip, or choose a new --out",
            )
        self._check_number(paths)
        return self._images.positions_of(self._listed(BAD_IMAGES)).tolist()  # type: ignore[no-any-return]

    def paths(self) -> list[str]:
        """Paths of all bad images found so far, relative to the data folder, sorted."""
        return sorted(self._listed(BAD_IMAGES) | self._listed(DAMAGED_IMAGES))

    def met(self, reasons: dict[int, str], hopeless: Collection[int]) -> None:
        """Record bad images.

        Args:
            reasons: why each cannot be decoded, by position in the split.
            hopeless: positions of those that have no decodable part.

        Raises:
            UserError: if `skip` is off, or if there are too many.

        """
        if not self._skip:
            raise undecodable(self._images, reasons, "; or add --on-bad-image skip")
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
            say(f"replaced {printable(path)} with another image: {reason}")

    def _listed(self, pattern: str) -> set[str]:
        lists = [os.fsdecode(path.read_bytes()) for path in self._out.glob(pattern.format("*"))]
        return {line for text in lists for line in text.split("\n") if line and not line.startswith("#")}

    def _check_number(self, paths: Collection[str]) -> None:
        if len(paths) > self._at_most:
            raise UserError(
                f"--max-bad-images {self._at_most}: {len(paths)} images cannot be decoded: {some(sorted(paths))}",
                f"inspect the data: launch.py check-data --data {self._images.root.parent}",
            )
