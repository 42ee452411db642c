"""Training images that cannot be decoded: replaced where that was asked for, counted, and remembered by the run."""

from __future__ import annotations

import os
from pathlib import Path

from fast_spatial.files import write_atomically
from fast_spatial.runlog import say
from pipelines.dataset import ImageIndex
from pipelines.loader import undecodable

_LIST = "bad_images.rank_{}.txt"


class BadImages:
    """The images of a run that cannot be decoded, as all its processes have met them.

    Every process keeps a list of its own, `OUT/bad_images.rank_R.txt`, which --exclude reads, too. None has to know
    what the others met: which image replaces another does not depend on when that was found.

    Args:
        out: the run's folder.
        rank: the GLOBAL rank.
        images: the split that is trained on.
        skip: whether they are replaced; otherwise the first ones end the run.
        at_most: more than so many end the run in any case.

    """

    def __init__(self, out: Path, rank: int, images: ImageIndex, *, skip: bool, at_most: int) -> None:
        self._out, self._mine, self._images = out, out / _LIST.format(rank), images
        self._skip, self._at_most = skip, at_most

    def positions(self) -> list[int]:
        """The positions of all that were met so far."""
        return self._images.positions_of(self.paths()).tolist()  # type: ignore[no-any-return]

    def paths(self) -> list[str]:
        """The paths of all that were met so far, relative to the data folder, sorted."""
        lists = [
            path.read_text(encoding="utf-8", errors="surrogateescape") for path in self._out.glob(_LIST.format("*"))
        ]
        return sorted({line for text in lists for line in text.splitlines() if line and not line.startswith("#")})

    def met(self, reasons: dict[int, str]) -> None:
        """Remember images, by position in the split, that cannot be decoded, and why.

        Raises:
            ValueError: if they are not to be skipped, or are too many.

        """
        if not self._skip:
            raise undecodable(self._images, reasons, "; or give the same command with --on-bad-image skip")
        found = {self._images.relative_path(position): reason for position, reason in reasons.items()}
        total = len({*self.paths(), *found})
        if total > self._at_most:
            path, reason = next(iter(found.items()))
            raise ValueError(
                f"--max-bad-images {self._at_most}: {total} images cannot be decoded, {path} for one: {reason}\n"
                f"look at the disk and the folder with launch.py check --data {self._images.root.parent}"
            )
        lines = [f"# {reason}\n{path}\n" for path, reason in found.items()]
        before = self._mine.read_bytes() if self._mine.is_file() else b""
        write_atomically(self._mine, lambda file: file.write(before + os.fsencode("".join(lines))))
        for path, reason in found.items():
            say(f"{path} is replaced by another image: {reason}")
