"""Data wait: of the host on CPUs, of the stream on GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fast_spatial.runtime import runlog, waiting
from fast_spatial.runtime.runlog import Bar
from fast_spatial.runtime.waiting import HostClock, StreamClock, clock_of


class Event:
    """A fake CUDA event: `Event.now` is the stream's time, `Event.reached` the work that it has finished."""

    now, reached = 0.0, 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at = Event.now

    def query(self) -> bool:
        return self.at <= Event.reached

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.now = Event.reached = 0.0
    return torch.device("cuda", 0)


def test_a_gpu_s_wait_is_that_of_its_stream(gpu):
    clock = clock_of(gpu)
    assert isinstance(clock, StreamClock) and clock.seconds == 0
    for begun, there in ((1.0, 1.5), (3.0, 3.0), (5.0, 5.25)):
        Event.now = begun
        clock.start()
        Event.now = there
        clock.stop()
    assert clock.seconds == 0  # nothing is asked of what the stream has not reached
    Event.reached = 4
    assert clock.seconds == 0.5
    Event.reached = 6
    assert clock.seconds == 0.75
    assert clock.seconds == 0.75


def test_what_was_begun_and_never_came_is_no_wait(gpu):
    clock = StreamClock(gpu)
    clock.start()
    Event.now = 1.0
    clock.start()
    Event.now = Event.reached = 3.0
    clock.stop()
    assert clock.seconds == 2.0


def test_a_bar_tells_the_share_of_its_time_that_was_waited(monkeypatch):
    now = [10.0]
    for module in (runlog, waiting):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow():
        for number in range(3):
            now[0] += 0.5
            yield number

    bar = Bar(slow(), total=3, images_per_batch=8, title="", show=False, wait=clock_of(torch.device("cpu")))
    assert list(bar) == [0, 1, 2]
    assert (bar.data_wait_pct, bar.images_per_sec) == (100, 16)
    busy = Bar(slow(), total=3, images_per_batch=8, title="", show=False, wait=HostClock())
    for _ in busy:
        now[0] += 1.5
    assert (busy.data_wait_pct, busy.images_per_sec) == (25, 4)
    idle = Bar(iter(range(3)), total=3, images_per_batch=8, title="", show=False, wait=HostClock())
    for _ in idle:
        now[0] += 1.5
    assert idle.data_wait_pct == 0
