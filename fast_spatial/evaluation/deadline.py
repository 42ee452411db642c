"""Work that is to end by a time: before every piece of it, whether one more would fit."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

# To gather what was found and to write it, of few images.
RESERVE_SEC = 1.0

Piece = TypeVar("Piece")


class TimeUp(Exception):
    """Another piece of work would end too late."""


class Deadline:
    """Says when to stop, so that all is written by `until`, a time of this machine's `time.monotonic()` (None: never).

    A piece of work is expected to take as long as the one before it, gathering and writing `reserve_sec`.
    """

    def __init__(self, until: float | None, *, reserve_sec: float = RESERVE_SEC) -> None:
        self._until = math.inf if until is None else until - reserve_sec
        self._checked = time.monotonic()

    def check(self) -> None:
        """Raise `TimeUp` unless another piece fits that takes as long as what was done since the last call."""
        now = time.monotonic()
        took, self._checked = now - self._checked, now
        if now + took > self._until:
            raise TimeUp

    def guard(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces, `check` before each."""
        for piece in pieces:
            self.check()
            yield piece
