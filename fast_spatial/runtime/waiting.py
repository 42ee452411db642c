"""Data wait: the time that a device waits for the loader, and so the most that faster loading can save."""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Clock(Protocol):
    """Sums the intervals from `start` to `stop`."""

    def start(self) -> None:
        """Begin an interval, when all earlier work has been given to the device."""

    def stop(self) -> None:
        """End the interval, when the next batch has been given to the device."""

    @property
    def seconds(self) -> float:
        """The sum of all finished intervals."""


class HostClock:
    """The clock of a device that works synchronously, such as the CPU."""

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
    """The clock of a GPU: from the end of all earlier work to the arrival of the next batch, on its stream.

    The host runs ahead, so it may wait for a batch that the GPU does not need yet; this wait does not count. No method
    synchronizes the device.
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
    """The clock of a device's data wait."""
    return StreamClock(device) if device.type == "cuda" else HostClock()
