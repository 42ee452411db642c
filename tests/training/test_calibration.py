"""Calibration: throughput of real steps, and the values that plans need."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fast_spatial.config import recipes
from fast_spatial.config.commands import CalibrateConfig
from fast_spatial.config.fields import to_json
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.images import load_split
from fast_spatial.evaluation.forward import BatchedForward, default_judge_batch
from fast_spatial.evaluation.validation import Validation
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.training import calibration
from fast_spatial.training.step import TrainStep

ALONE = World(0, 0, 1, torch.device("cpu"))


def config_of(**raw: str) -> TrainConfig:
    return recipes.train_config({"data": "digits", "out": "o", "mode": "worst10", **raw})


def test_a_calibration_measures_each_kind_of_training_once_and_writes_what_plans_need(tmp_path, monkeypatch):
    measured = []
    measure = calibration.measure_training

    def counted(config, *rest, **options):
        measured.append(config.mode)
        return measure(config, *rest, **options)

    monkeypatch.setattr(calibration, "measure_training", counted)
    rows = [("standard", "30", "0"), ("random", "30", "0"), ("random", "40", "0"), ("random", "30", "7")]
    trainings = tuple(
        to_json(config_of(mode=mode, degrees=degrees, seed=seed, max_train_images="160"))
        for mode, degrees, seed in rows
    )
    file = tmp_path / "found.json"
    config = CalibrateConfig(trainings=trainings, sides=(16, 32), json=str(file), seconds=0.01)
    looks = iter([50.0, 57.0, 58.0])  # at the start, for what was spent, for what is left
    monkeypatch.setattr(calibration, "time", SimpleNamespace(monotonic=looks.__next__, perf_counter=time.perf_counter))
    calibration.calibrate(config, World(0, 0, 1, torch.device("cpu"), probe_sec=100), 1000.0)
    found = json.loads(file.read_text())
    assert measured == ["standard", "random"]
    assert len(found["trainings"]) == 4
    assert found["trainings"][1] == found["trainings"][2] == found["trainings"][3] != found["trainings"][0]
    assert all(set(t["images_per_sec"]) == {"16", "32"} for t in found["trainings"])
    assert (found["images"], found["val_images"], found["classes"], found["gpus"]) == (160, 300, 10, 0)
    assert found["val_images_of_a_class"] == 22
    assert found["training_cold_sec"] >= 0 and found["judging_cold_sec"] > 0  # which begins with a twin and a loader
    assert (found["busy_sec"], found["left_sec"]) == (7 + 100, 1000 - 58)
    distributed.stop()


def test_calibrations_train_on_images_without_changing_a_weight(monkeypatch):
    seen = []
    step = TrainStep.__call__

    def counted(self, batch):
        before = [p.detach().clone() for p in self.model.net.parameters()]
        result = step(self, batch)
        seen.append((len(batch.labels), batch.views.shape[2]))
        assert all(torch.equal(a, b) for a, b in zip(before, self.model.net.parameters()))
        return result

    monkeypatch.setattr(TrainStep, "__call__", counted)
    monkeypatch.setitem(calibration.MOST_PIXELS, "cpu", 8 * 32 * 32)
    config = config_of(mode="random", max_train_images="160", grad_accum_steps="4")
    images = load_split("digits", "train", max_images=160)
    found = calibration.measure_training(config, images, World(0, 0, 1, torch.device("cpu")), [16, 32], seconds=1e-9)
    # Five untimed steps and four timed ones; a CPU step has eight images of 32 pixels here.
    assert seen == [(32, 16)] * 9 + [(8, 32)] * 9
    assert all(rate.per_sec > 0 and rate.cold_sec >= 0 for rate in found.values())


class PlantedClock:
    """A clock that only passes advance: each kind's first one by more than the later ones."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, method: str, cold_sec: float, warm_sec: float) -> None:
        self.now_sec, self._to_come = 0.0, [cold_sec]
        take = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            self.now_sec += self._to_come.pop() if self._to_come else warm_sec
            return take(*args, **options)

        patch.setattr(owner, method, timed)
        clock = SimpleNamespace(perf_counter=lambda: self.now_sec, monotonic=lambda: self.now_sec)
        patch.setattr(calibration, "time", clock)
        patch.setattr(calibration, "synchronized_time", lambda device: self.now_sec)


@pytest.mark.parametrize(("first_sec", "cold_sec"), [(6.25, 6.0), (0.25, 0.0), (0.1, 0.0)])
def test_cold_steps_of_a_training_are_measured_beyond_the_warm_rate(monkeypatch, first_sec, cold_sec):
    PlantedClock(monkeypatch, TrainStep, "__call__", first_sec, warm_sec=0.25)
    config = config_of(mode="random", max_train_images="160")
    images = load_split("digits", "train", max_images=160)
    found = calibration.measure_training(config, images, ALONE, [16, 32], seconds=1e-9)
    assert [rate.cold_sec for rate in found.values()] == pytest.approx([cold_sec, 0.0])
    assert found[16].per_sec == pytest.approx(config.global_batch_size / 0.25)


def test_a_cold_first_validation_is_measured_beyond_the_warm_rate(monkeypatch):
    PlantedClock(monkeypatch, Validation, "__call__", 3.0, warm_sec=0.5)
    images = load_split("digits", "val")
    found = calibration.measure_validation(config_of(), images, ALONE)
    assert found.cold_sec == 2.5
    assert found.per_sec == pytest.approx(64 / 0.5)  # one batch of the training's size


def test_a_cold_evaluation_is_measured_beyond_the_warm_rate(monkeypatch):
    PlantedClock(monkeypatch, BatchedForward, "warped", 4.0, warm_sec=0.5)
    found = calibration.measure_judging(config_of(), load_split("digits", "val"), ALONE, seconds=1e-9)
    assert found.cold_sec == 3.5
    assert found.per_sec == pytest.approx(default_judge_batch(ALONE.device, 32) / 0.5)
