"""GPUs by NVIDIA's management library, simulated."""

from __future__ import annotations

import sys

import pytest

from fast_spatial.pipelines import nvml
from fast_spatial.pipelines.inspection import probe
from tests.helpers.fake_nvml import FakeNvml


@pytest.fixture
def driver(monkeypatch) -> FakeNvml:
    fake = FakeNvml({"a": 5_000_000, "b": 2**40})
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_energy_is_the_sum_of_the_gpus_in_joules(driver):
    assert nvml.energy_joules(["a"]) == 5000
    assert nvml.energy_joules(["a", "b"]) == 5000 + 2**40 / 1000


def test_energy_that_cannot_be_told_is_none(driver, monkeypatch):
    assert nvml.energy_joules([]) is None
    assert nvml.energy_joules(["a", "unknown"]) is None
    driver.counters["a"] = None
    assert nvml.energy_joules(["a"]) is None
    assert nvml.energy_joules(["b"]) == 2**40 / 1000
    driver.starts = False
    assert nvml.energy_joules(["b"]) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert nvml.energy_joules(["b"]) is None


def test_a_machine_is_told_by_its_gpus_and_driver(driver):
    assert nvml.gpus_and_driver() == (["GPU a", "GPU b"], "580.65.06")
    driver.lost = "a"
    assert nvml.gpus_and_driver() == (["GPU b"], "580.65.06")


def test_a_machine_without_a_driver_is_told_by_its_name(driver, monkeypatch):
    assert probe._gpus() == {"gpus": ["GPU a", "GPU b"], "driver": "580.65.06"}
    driver.starts = False
    assert nvml.gpus_and_driver() is None
    monkeypatch.setattr("platform.node", lambda: "here")
    assert probe._gpus() == {"gpus": [], "driver": "of here"}


def test_the_package_has_what_the_simulation_has():
    import pynvml

    names = [name for name in dir(FakeNvml) if name.startswith("nvml")]
    assert len(names) == 7
    assert all(callable(getattr(pynvml, name)) for name in names)
    assert issubclass(pynvml.NVMLError, Exception)
