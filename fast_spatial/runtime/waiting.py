"""How long a device waits for data: what is left of a run's time when nothing but loading is made faster."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Clock(Protocol):
    """Adds up the times from `start` to `stop`."""

    def start(self) -> None:
        """All work so far has been given to the device."""

    def stop(self) -> None:
        """The next batch has been, too."""

    @property
    def seconds(self) -> float:
        """The sum of all that ended."""


class HostClock:
    """Of a device that has done all work when it was given."""

    def __init__(self) -> None:
        self._sum, self._started = 0.0, 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._sum += time.perf_counter() - self._started

    @property
    def seconds(self) -> float:
        return self._sum


class StreamClock:
    """Of a GPU: from when it has done all earlier work to when the next batch is in its memory, on its stream.

    The host runs ahead and then waits for a batch that the GPU does not need yet; that is no loss. Nothing here waits.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._stream = torch.cuda.current_stream(device)
        self._event = partial(torch.cuda.Event, enable_timing=True)
        self._sum = 0.0
        self._pairs: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def start(self) -> None:
        self._start = self._event()
        self._start.record(self._stream)

    def stop(self) -> None:
        end = self._event()
        end.record(self._stream)
        self._pairs.append((self._start, end))
        self._add_up()

    @property
    def seconds(self) -> float:
        self._add_up()
        return self._sum

    def _add_up(self) -> None:
        while self._pairs and self._pairs[0][1].query():  # type: ignore[no-untyped-call]
            start, end = self._pairs.popleft()
            self._sum += start.elapsed_time(end) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock of a device's waits."""
    return StreamClock(device) if device.type == "cuda" else HostClock()
