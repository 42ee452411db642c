"""What an epoch counts: the chosen views are those that were drawn, and a part of every checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fast_spatial.config import recipes
from fast_spatial.config.train import TrainConfig
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import TRAINING, Views, draw_matrices, draw_warps, pack_key
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.training.epoch_sums import ChosenViews, EpochSums, as_record
from fast_spatial.training.state import Position
from fast_spatial.training.train import train

CPU = torch.device("cpu")
VIEWS = Views(10, SpatialLimits.from_px(30.0))
SEED, EPOCH = 7, 3


@pytest.fixture(autouse=True)
def _stand_down():
    yield
    distributed.stop()


def chosen(indices: range, choices: list[int], views: Views = VIEWS) -> ChosenViews:
    found = ChosenViews(views, SEED, EPOCH)
    found.add(torch.tensor(indices), torch.tensor(choices))
    return found


def test_the_warps_of_chosen_views_are_those_of_their_matrices():
    key, indices, choices = pack_key(TRAINING, SEED), np.arange(50), np.arange(50) % 11
    warps_B3 = draw_warps(key, EPOCH, indices, choices, VIEWS)
    matrices_B23 = draw_matrices(key, EPOCH, indices, VIEWS, 225)[np.arange(50), choices]
    angles = np.degrees(np.arctan2(matrices_B23[:, 1, 0], matrices_B23[:, 0, 0]))
    np.testing.assert_allclose(warps_B3[:, 0], angles, atol=1e-4)
    center = np.full(2, 112.0)
    shifted = (matrices_B23[:, :, :2] @ center + matrices_B23[:, :, 2] - center) / 224
    np.testing.assert_allclose(warps_B3[:, 1:], shifted, atol=1e-5)
    assert not warps_B3[choices == 0].any() and np.abs(warps_B3[:, 0]).max() > 20


def test_counts_are_of_the_chosen_views_alone():
    key, choices = pack_key(TRAINING, SEED), [0, 0, 1, 5, 10]
    about = as_record(chosen(range(5), choices).state(CPU), VIEWS)
    assert about["untransformed_pct"] == 40.0
    assert (about["limit_degrees"], about["limit_px"]) == (30.0, 24.0)
    degrees = draw_warps(key, EPOCH, np.arange(2, 5), np.array(choices[2:]), VIEWS)[:, 0]
    assert about["degrees"] == np.histogram(degrees, 12, (-30, 30))[0].tolist()
    assert [sum(about[name]) for name in ("degrees", "tx_px", "ty_px")] == [3, 3, 3]


def test_without_rotations_only_translations_are_counted():
    views = Views(10, SpatialLimits.from_px(0.0, 24.0))
    about = as_record(chosen(range(8), [1] * 8, views).state(CPU), views)
    assert sum(about["degrees"]) == 0 and sum(about["tx_px"]) == 8 and about["untransformed_pct"] == 0.0


def test_counts_go_on_from_saved_ones():
    whole = chosen(range(20), [1] * 20)
    resumed = ChosenViews(VIEWS, SEED, EPOCH)
    resumed.load(chosen(range(12), [1] * 12).state(CPU))
    resumed.add(torch.arange(12, 20), torch.ones(8, dtype=torch.int64))
    assert resumed.state(CPU) == whole.state(CPU) == whole.state(CPU)


def test_an_epoch_that_an_earlier_version_began_has_no_counts():
    sums = EpochSums(VIEWS, SEED, EPOCH, CPU)
    sums.load_state_dict({"tally": [6.0, 3.0, 12.0]}, leads=True)
    assert sums.means(over_ranks=False) == {"loss": 0.5, "top1": 0.25}
    assert sums.chosen() is None and sums.state_dict()["chosen"] is None


def test_a_position_knows_its_epoch():
    position = Position(4)
    for _ in range(4):
        position = position.next_step()
    assert (position.epoch, position.step, position.steps_done, position.epochs_done) == (0, 4, 4, 1)
    position = position.next_epoch().next_step()
    assert (position.epoch, position.step, position.steps_done, position.epochs_done) == (1, 1, 5, 1.25)
    assert [position.steps_in_epoch(end) for end in (20, 8, 6, 4, 2)] == [4, 4, 2, 0, -2]
    assert Position.saved({"epoch": 1, "step": 1}, 4) == position  # of an earlier version


def config_of(out: Path, **flags: str) -> TrainConfig:
    small = {"epochs": "2", "max_train_images": "64", "global_batch_size": "16", "views": "3", "milestones": "2"}
    return recipes.train_config({"data": "digits", "mode": "worst10", "out": str(out), **small, **flags})


@pytest.mark.parametrize("mode", ["worst10", "random"])
def test_the_log_has_the_chosen_views_of_each_epoch(tmp_path, mode):
    train(config_of(tmp_path, mode=mode, eval_every="0"), World(0, 0, 1, CPU))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    found = [record for record in records if record["event"] == "chosen"]
    if mode == "random":  # one view per image: there is no choice
        assert not found
        return
    assert [record["epoch"] for record in found] == [1, 2]
    for record in found:
        assert sum(record["degrees"]) == round(64 * (1 - record["untransformed_pct"] / 100))
    assert found[0]["degrees"] != found[1]["degrees"]
