"""Deadlines: a check before every piece of work whether it would end in time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

# Time to gather and write the results of a few images.
RESERVE_SEC = 1.0

Piece = TypeVar("Piece")


class TimeUp(Exception):
    """Another piece of work would end too late."""


class Deadline:
    """Stops work so that all is written by `until`, a time of this machine's `time.monotonic()` (None: no deadline).

    A piece of work is expected to take as long as the one before it. Gathering and writing take `reserve_sec`.
    """

    def __init__(self, until: float | None, *, reserve_sec: float = RESERVE_SEC) -> None:
        self._until = math.inf if until is None else until - reserve_sec
        self._checked = time.monotonic()

    def check(self) -> None:
        """Raise `TimeUp` unless another piece fits that takes as long as the time since the last call."""
        now = time.monotonic()
        took, self._checked = now - self._checked, now
        if now + took > self._until:
            raise TimeUp

    def guard(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yield the pieces, with `check` before each."""
        for piece in pieces:
            self.check()
            yield piece
