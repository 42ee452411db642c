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

    A piece of work is expected to take as long as the faster one of the two before it: a first piece is cold, since it
    loads and compiles kernels, and may take seconds longer than the next. The first two pieces begin whenever time is
    left. Gathering and writing take `reserve_sec`.
    """

    def __init__(self, until: float | None, *, reserve_sec: float = RESERVE_SEC) -> None:
        self._until = math.inf if until is None else until - reserve_sec
        self._took: list[float] = []
        self._checked: float | None = None

    def check(self) -> None:
        """Raise `TimeUp` unless another piece is expected to end in time. Called before every piece of work."""
        now = time.monotonic()
        if self._checked is not None:
            self._took = [*self._took[-1:], now - self._checked]
        self._checked = now
        expected_sec = min(self._took) if len(self._took) == 2 else 0.0
        if now + expected_sec > self._until:
            raise TimeUp

    def guard(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yield the pieces, with `check` before each."""
        for piece in pieces:
            self.check()
            yield piece
