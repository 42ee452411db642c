"""Energy of GPUs, from a simulated driver library."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest

from fast_spatial.runtime import runlog
from fast_spatial.runtime.energy import EnergyMeter, gpu_energy_joules, local_gpus
from fast_spatial.runtime.runlog import RunLog

FAILED = 999


class Nvml:
    """Counters by UUID, in millijoules; GPUs without an entry have no counter."""

    def __init__(self, counters: dict[str, int | None], *, starts: bool = True) -> None:
        self.counters, self.starts, self._names = counters, starts, list(counters)

    def nvmlInit_v2(self) -> int:
        return 0 if self.starts else FAILED

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, device: Any) -> int:
        name = uuid.decode().removeprefix("GPU-")
        if name not in self.counters:
            return FAILED
        device._obj.value = self._names.index(name) + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: Any, millijoules: Any) -> int:
        counter = self.counters[self._names[device.value - 1]]
        if counter is None:
            return FAILED
        millijoules._obj.value = counter
        return 0


@pytest.fixture
def driver(monkeypatch):
    nvml = Nvml({"a": 5_000_000, "b": 2**40})
    monkeypatch.setattr(ctypes, "CDLL", lambda _: nvml)
    return nvml


def test_energy_is_the_sum_of_the_gpus_in_joules(driver):
    assert gpu_energy_joules(["a"]) == 5000
    assert gpu_energy_joules(["a", "b"]) == 5000 + 2**40 / 1000


def test_energy_that_cannot_be_told_is_none(driver, monkeypatch):
    assert gpu_energy_joules([]) is None
    assert gpu_energy_joules(["a", "unknown"]) is None
    driver.counters["a"] = None
    assert gpu_energy_joules(["a"]) is None
    driver.starts = False
    assert gpu_energy_joules(["b"]) is None

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpu_energy_joules(["b"]) is None


def test_a_meter_tells_what_was_used_since_it_was_asked_before(driver):
    meter = EnergyMeter(["a"])
    driver.counters["a"] += 3_600_000_000
    assert meter.take_kwh() == 1.0
    assert meter.take_kwh() == 0.0
    driver.counters["a"] = None
    assert meter.take_kwh() is None
    driver.counters["a"] = 0
    assert meter.take_kwh() is None  # nothing to compare with


def test_gpus_of_other_machines_are_not_counted():
    assert local_gpus(0) == []
    assert local_gpus(10_000) == []


def test_records_hold_the_energy_since_the_one_before(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "local_gpus", lambda count: ["a"] * (count > 0))
    for gpus in (1, 0):
        log = RunLog(tmp_path / str(gpus), rank=0, gpus=gpus)
        log.begin()
        for step in (1, 2):
            driver.counters["a"] += step * 360_000_000
            log.record("train", step, loss=1.0)
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "1" / "log.jsonl").read_text().splitlines()]
    assert [line["energy_kwh"] for line in lines] == [0.1, 0.2]
    assert "energy_kwh" not in (tmp_path / "0" / "log.jsonl").read_text()
