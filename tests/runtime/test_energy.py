"""Energy of GPUs, from a simulated driver."""

from __future__ import annotations

import json
import sys

import pytest

from fast_spatial.runtime import runlog
from fast_spatial.runtime.energy import EnergyMeter, local_gpus
from fast_spatial.runtime.runlog import RunLog
from tests.helpers.fake_nvml import FakeNvml


@pytest.fixture
def driver(monkeypatch) -> FakeNvml:
    fake = FakeNvml({"a": 5_000_000})
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


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
