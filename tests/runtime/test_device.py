"""Timing of a device's work."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fast_spatial.runtime import device
from fast_spatial.runtime.device import synchronized_time


def test_the_clock_is_read_after_the_device_has_finished(monkeypatch):
    seen: list[object] = []

    def read() -> float:
        seen.append("read")
        return 7.0

    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=read))
    assert synchronized_time(torch.device("cuda", 1)) == 7.0
    assert seen == [torch.device("cuda", 1), "read"]
    assert synchronized_time(torch.device("cpu")) == 7.0
    assert seen[2:] == ["read"]
