"""The cost of a training: rates of real steps, and what follows from them."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch

from fast_spatial import preflight
from fast_spatial.config import recipes
from fast_spatial.config.commands import CalibrateConfig, RecipesConfig
from fast_spatial.config.fields import to_json
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.images import load_split
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.tools import recipe_table
from fast_spatial.training import calibration
from fast_spatial.training.calibration import measure_steps, training_hours
from fast_spatial.training.step import TrainStep


def config_of(**raw: str) -> TrainConfig:
    return recipes.train_config({"data": "digits", "out": "o", "mode": "worst10", **raw})


def test_the_steps_that_are_timed_are_those_of_training(monkeypatch):
    seen = []
    step = TrainStep.__call__
    clock = [0.0]

    def counted(self, batch):
        clock[0] += 0.25
        seen.append((tuple(batch.views.shape), self.scorer is not None))
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", counted)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    config = config_of(views="2", global_batch_size="8")
    found = measure_steps(config, torch.device("cpu"), [16, 32], num_classes=10, processes=2, seconds=1.0)
    assert found == {16: 16.0, 32: 16.0}  # four images in a quarter of a second
    # Two steps that are not timed, and four that are.
    assert seen == [((4, 3, 16, 16, 3), True)] * 6 + [((4, 3, 32, 32, 3), True)] * 6


def test_large_steps_are_measured_on_fewer_images(monkeypatch):
    monkeypatch.setitem(calibration.MOST_PIXELS, "cpu", 3 * 32 * 32)
    seen = []
    step = TrainStep.__call__

    def counted(self, batch):
        seen.append(len(batch.labels))
        return step(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", counted)
    measure_steps(config_of(mode="random"), torch.device("cpu"), [16, 32], num_classes=10, seconds=1e-9)
    assert seen == [12] * 5 + [3] * 5


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
    config = config_of(mode="random", max_train_images="160", accumulate="4")
    images = load_split("digits", "train", max_images=160)
    found = calibration.measure_training(config, images, World(0, 0, 1, torch.device("cpu")), [16, 32], seconds=1e-9)
    # Three steps and two, and the four that are timed; a CPU takes eight images of 32 pixels at a time here.
    assert seen == [(32, 16)] * 9 + [(8, 32)] * 9
    assert all(rate > 0 for rate in found.values())


def test_hours_follow_from_the_share_of_each_side():
    config = config_of(start_side="16", side="32", epochs="4")
    # 4 epochs of 900 images: three quarters of the 3600 at 3 a second, the others at 1 a second.
    assert training_hours(config, 900, {16: 3.0, 32: 1.0}) == pytest.approx((2700 / 3 + 900) / 3600)
    assert training_hours(config_of(epochs="4"), 900, {32: 2.0}) == pytest.approx(0.5)


@pytest.fixture
def rates(monkeypatch):
    """One process does 1000 images a second of one view and 100 of many, at any side."""
    monkeypatch.setattr(preflight, "gpu_count", lambda: 0)

    def measured(config, device, sides, *, num_classes, processes, seconds):
        return dict.fromkeys(sides, 100.0 if len(config.view_limits()) > 1 else 1000.0)

    monkeypatch.setattr(recipe_table, "measure_steps", measured)


def test_the_table_has_every_recipe_of_imagenet_with_its_cost_and_orientation(rates):
    text = recipe_table.list_recipes(RecipesConfig())
    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:8]}
    assert list(rows) == ["reference", "e16", "e24", "e32", "e40", "e56", "e88"]
    # 16 epochs of 1,281,167 images at 1000 a second are 5.69 hours; at 100 a second, 56.9: 2.4 days.
    assert rows["e16"][:10] == ["e16", "16", "1024", "2", "160-192", "5.7", "h", "5.7", "h", "2"]
    assert " ".join(rows["reference"][-1:]) == "-"
    assert "label_smoothing 0.1" in text and "16 epochs 66.9 % in 35 min" in text
    assert "with BlurPool" in text and "upper bounds" in text and "extrapolated" in text


def test_the_digits_have_a_table_of_their_own(rates):
    text = recipe_table.list_recipes(RecipesConfig(data="digits"))
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["digits", "digits_linear"]
    # 8 epochs of 1,497 images at 1000 a second: 12 seconds; at 100 a second, 2 minutes.
    assert text.splitlines()[1].split()[5:11] == ["0.2", "min", "0.2", "min", "2", "min"]
    assert "1,497 images (digits)" in text and "upper bounds" not in text
