"""Evaluations and landscapes that stop in time: what they report is that of a smaller, fixed subset.

Clocks are planted: a second passes at every look at them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from fast_spatial.config.commands import EvaluateConfig, LandscapeConfig
from fast_spatial.errors import UserError
from fast_spatial.evaluation import deadline, evaluate, inputs, landscape, landscape_files
from fast_spatial.evaluation.deadline import Deadline, TimeUp
from fast_spatial.evaluation.evaluate import evaluate_checkpoint, grid_deviations
from fast_spatial.evaluation.verdicts import Summary, judge_images
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.dataset import read_index
from fast_spatial.runtime import distributed

ALONE = distributed.World(0, 0, 1, torch.device("cpu"))
THRESHOLD, SIDE = 100, 16
# Brightness of every image. Warps darken: days below 100 are wrong untouched, dim ones are broken, bright ones survive.
LEVELS = {"day": [250, 112, 90, 240, 113, 230, 111], "night": [10, 150, 20, 30, 40]}
# Batches of 4 images that all views of are judged, or to be judged on 11 views: 3 pieces.
BATCH = 4


class Brightness(nn.Module):
    """Takes bright images for days, class 0, and dark ones for nights."""

    def forward(self, images: Tensor) -> Tensor:
        margin = images.mean(dim=(1, 2, 3)) - THRESHOLD / 255
        return torch.stack([margin, -margin], dim=1)


def plant(patch: pytest.MonkeyPatch, data: Path, clock_step: float = 1.0) -> None:
    """The model in place of a checkpoint's, and a clock."""
    planted = Classifier(Brightness(), mean=(0, 0, 0), std=(1, 1, 1))
    images = read_index(data, "val")

    def load_model_and_images(config: EvaluateConfig) -> inputs.Inputs:
        return inputs.Inputs(planted.eval(), images, inputs._on_grid(config, images), SIDE)

    for module in (evaluate, inputs):
        patch.setattr(module, "load_model_and_images", load_model_and_images)
    patch.setattr(deadline, "time", SimpleNamespace(monotonic=itertools.count(clock_step, clock_step).__next__))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of flat images."""
    root = tmp_path_factory.mktemp("data")
    for name, levels in LEVELS.items():
        (root / "val" / name).mkdir(parents=True)
        for number, level in enumerate(levels):
            Image.new("RGB", (24, 24), (level,) * 3).save(root / "val" / name / f"{number}.png")
    return root


@pytest.fixture
def planted(data, monkeypatch):
    """The folder, and everything planted."""
    plant(monkeypatch, data)
    return data


def evaluation(until: float | None = None, world: distributed.World = ALONE, **options: Any) -> None:
    config = EvaluateConfig(
        checkpoint="planted.pt",
        data="digits",  # which have no published side
        batch_size_per_process=BATCH,
        views_per_forward=8,
        workers=1,
        **options,
    )
    evaluate_checkpoint(config, world, until)


def judged(out: Path, until: float | None = None, **options: Any) -> tuple[Summary, list[Any]]:
    evaluation(until, json=str(out / "found.json"), **options)
    content = json.loads((out / "found.json").read_text())
    summary = content["summary"]
    return Summary(**{**summary, "deviations": tuple(summary["deviations"])}), content["images"]


# --- the clock


def look_at(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    monkeypatch.setattr(deadline, "time", SimpleNamespace(monotonic=iter(times).__next__))


def test_a_piece_fits_if_it_may_take_as_long_as_the_faster_of_the_two_before_it(monkeypatch):
    look_at(monkeypatch, 10.0, 12.0, 15.0, 16.0, 17.5, 19.0)
    by_20 = Deadline(20.0 + deadline.RESERVE_SEC)
    for _ in range(5):
        by_20.check()  # at 17.5, after 1 s and 1.5 s: until 18.5
    with pytest.raises(TimeUp):
        by_20.check()  # at 19, after 1.5 s twice: until 20.5


def test_a_cold_first_piece_does_not_stop_the_second(monkeypatch):
    look_at(monkeypatch, 0.0, 6.0, 6.1, 6.2)
    by_8 = Deadline(8.0 + deadline.RESERVE_SEC)
    for _ in range(4):
        by_8.check()


def test_a_cold_first_piece_of_the_grid_does_not_stop_the_second(monkeypatch):
    look_at(monkeypatch, 0.0, 1.0, 2.0, 6.5, 7.0)
    by_8 = Deadline(8.0 + deadline.RESERVE_SEC)
    for _ in range(4):
        by_8.check()  # at 6.5, after 1 s and a cold 4.5 s: until 7.5
    by_8.check()


def test_no_piece_begins_when_the_time_is_up(monkeypatch):
    look_at(monkeypatch, 0.0, 8.5)
    by_8 = Deadline(8.0 + deadline.RESERVE_SEC)
    by_8.check()
    with pytest.raises(TimeUp):
        by_8.check()  # after the first piece, of which nothing is expected


def test_without_a_deadline_there_is_always_time(monkeypatch):
    monkeypatch.setattr(deadline, "time", SimpleNamespace(monotonic=itertools.count(0.0, 1e9).__next__))
    assert list(Deadline(None).guard(range(100))) == list(range(100))


# --- evaluations


def test_a_deadline_that_is_kept_changes_nothing(planted, tmp_path):
    """But the order of the images, which come in rounds."""
    without = judged(tmp_path)
    assert without == judged(tmp_path, until=1e9)
    summary, images = without
    assert summary.natural_top1_pct == pytest.approx(100 * 10 / 12)
    assert summary.grid_top1_pct == pytest.approx(100 * 7 / 12)
    assert summary.grid_num_images == 12 and summary.grid_per_class == 0 and summary.deviations == ()
    assert all(image["grid"] is not None for image in images)


def test_a_grid_on_few_images_of_each_class_is_named_and_not_partial(planted, tmp_path, capfd):
    everything = {image["path"]: image for image in judged(tmp_path)[1]}
    summary, images = judged(tmp_path, grid_per_class=2)
    index = read_index(planted, "val")
    chosen = {index.relative_path(position) for position in index.balanced_positions(2)}
    assert {image["path"] for image in images if image["grid"] is not None} == chosen
    for image in images:
        grid = image.pop("grid")
        assert grid == (everything[image["path"]]["grid"] if image["path"] in chosen else None)
        assert image.items() < everything[image["path"]].items()
    assert (summary.num_images, summary.grid_num_images, summary.grid_per_class) == (12, 4, 2)
    assert summary.deviations == ("grid on 2 images of each class",) and not summary.partial
    assert "not the published protocol: grid on 2 images of each class" in capfd.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["config"]["grid_per_class"] == 2


def test_a_deadline_leaves_the_grid_of_the_rounds_that_were_finished(planted, tmp_path, monkeypatch):
    whole, _ = judged(tmp_path, until=1e9)
    few = {per_class: judged(tmp_path, grid_per_class=per_class) for per_class in range(1, 6)}
    found = []
    for until in itertools.chain((5.5, 8), range(220, 800, 90)):
        plant(monkeypatch, planted)
        summary, images = judged(tmp_path, until=until)
        found.append(summary.grid_per_class if summary.deviations else 6)
        per_class = summary.grid_per_class
        if not summary.deviations:
            assert summary == whole
        elif per_class:
            (text,) = summary.deviations
            assert text.startswith(f"grid on the first {per_class} image") and text.endswith("out of time")
            assert images == few[per_class][1]
            assert dataclasses.replace(summary, deviations=few[per_class][0].deviations) == few[per_class][0]
        else:
            assert summary.deviations == ("no grid: out of time",)
            assert (summary.grid_top1_pct, summary.grid_num_images) == (None, 0)
            assert summary.natural_top1_pct == whole.natural_top1_pct
    assert found == sorted(found)
    assert found[0] == 0 and found[-1] == 6 and len(set(found)) >= 4


def test_time_that_is_up_before_all_images_were_judged_leaves_the_rounds_that_were(planted, tmp_path, monkeypatch):
    evaluation(until=5.5)  # three batches, and a second in reserve
    whole = {row["path"]: row for row in judged(tmp_path)[1]}
    plant(monkeypatch, planted)
    summary, rows = judged(tmp_path, until=4.5)
    # Two batches of four are four rounds of two classes.
    assert (summary.num_images, summary.grid_num_images, summary.partial) == (8, 0, True)
    assert summary.deviations == (
        "all attacks on the first 4 images of each class: out of time",
        "no grid: out of time",
    )
    assert [Path(row["path"]).parent.name for row in rows] == ["day"] * 4 + ["night"] * 4
    assert all(whole[row["path"]] == {**row, "grid": whole[row["path"]]["grid"]} for row in rows)


def test_time_that_is_up_before_the_first_round_was_judged_is_an_error(planted, tmp_path):
    message = "the evaluation ran out of time before one image of every class was judged: planted.pt\n"
    with pytest.raises(
        UserError, match=f"^{re.escape(message)}give a larger budget, .* launch.py evaluate --checkpoint planted"
    ):
        evaluation(until=2, json=str(tmp_path / "found.json"))
    assert not (tmp_path / "found.json").exists()


def test_a_network_that_is_right_on_nothing_has_no_second_stage(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Brightness, "forward", lambda self, images: torch.tensor([[0.0, 0.0, 1.0]]).repeat(len(images), 1)
    )
    for until in (None, 1e9):
        summary, images = judged(tmp_path, until=until)
        assert (summary.natural_top1_pct, summary.grid_top1_pct, summary.grid_num_images) == (0, 0, 12)
        assert summary.grid_views_per_image == 1 and summary.deviations == ()
        assert not any(image["grid"] for image in images)


@pytest.mark.parametrize("until", [None, 1e9])
@pytest.mark.parametrize(
    ("name", "judge"),
    [
        ("judge_images", lambda passes, batch: judge_images(passes, batch)[1:]),
        ("judge_images", lambda passes, batch: judge_images(passes, batch) + judge_images(passes, batch)[:1]),
        ("judge_grid", lambda survivors, batches: None),
    ],
)
def test_a_verdict_that_is_missing_or_there_twice_is_never_taken_for_lack_of_time(
    planted, tmp_path, monkeypatch, name, judge, until
):
    monkeypatch.setattr(evaluate, name, judge)
    with pytest.raises(RuntimeError, match="one is missing or there twice"):
        judged(tmp_path, until=until)


def test_without_a_grid_its_time_is_never_up(planted, tmp_path):
    summary, _ = judged(tmp_path, until=5.5, grid=False)
    assert summary == judged(tmp_path, grid=False)[0]
    assert summary.deviations == ()


@pytest.mark.parametrize(
    ("per_class", "cut", "texts"),
    [
        (0, None, ()),
        (1, None, ("grid on 1 image of each class",)),
        (5, None, ("grid on 5 images of each class",)),
        (5, 1, ("grid on the first 1 image of each class: out of time",)),
        (0, 7, ("grid on the first 7 images of each class: out of time",)),
        (5, 0, ("no grid: out of time",)),
    ],
)
def test_what_is_said_of_a_grid_on_few_images(per_class, cut, texts):
    assert grid_deviations(per_class, cut) == texts


# --- landscapes


def map_views(
    data: Path, out: Path, until: float | None = None, world: distributed.World = ALONE, **options: Any
) -> Any:
    one_image = 775 // landscape.PASSES_PER_BATCH + 1
    config = LandscapeConfig(
        checkpoint="planted.pt", data=str(data), out=str(out), views_per_forward=one_image, workers=1, **options
    )
    landscape.landscape(config, world, until)
    return landscape_files.read(out)


@pytest.mark.parametrize(("until", "per_class"), [(10, 4), (9, 3), (5, 1), (100, 5)])
def test_a_landscape_cut_short_is_that_of_fewer_images(planted, tmp_path, until, per_class):
    """Of one image after another: N of them fit before second N + 2."""
    cut = map_views(planted, tmp_path / "cut", until)
    few = map_views(planted, tmp_path / "few", images_per_class=per_class)
    assert cut.about["images_per_class"] == per_class
    np.testing.assert_array_equal(cut.loss, few.loss)
    np.testing.assert_array_equal(cut.correct, few.correct)
    for about in (cut.about, few.about):
        del about["config"], about["seconds"]
    assert cut.about == few.about
    for sample in cut.about["samples"]:
        for kind in ("untouched", "worst"):
            assert (tmp_path / "cut" / sample[kind]).read_bytes() == (tmp_path / "few" / sample[kind]).read_bytes()


def test_no_round_in_time_is_no_landscape(planted, tmp_path, capfd):
    assert map_views(planted, tmp_path / "out", until=2) is None
    assert capfd.readouterr().out == "skipped the landscape: out of time\n"
    assert not (tmp_path / "out").exists()


# --- processes


def rank_main(rank: int, port: int, data: Path, out: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    world = distributed.start(stall_minutes=2)
    plant(pytest.MonkeyPatch(), data, clock_step=1.0 + 4 * rank)
    evaluation(450, world, json=str(out / "found.json"))
    evaluation(None, world, json=str(out / "whole.json"))
    plant(pytest.MonkeyPatch(), data, clock_step=1.0 + 4 * rank)
    map_views(data, out / "map", until=25, world=world)
    distributed.stop()


def test_processes_agree_on_what_the_slowest_of_them_finished(planted, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(rank_main, (port, planted, tmp_path), nprocs=2)
    content, whole = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("found", "whole"))
    assert whole["images"] == judged(tmp_path)[1]
    # The images of the first rounds are 3, 9 | 6, 10 | 0, 7. The fast process has judged its 3, 9, 10 and 0, for about
    # 97 s each; the slow one its 6, which breaks at once, and would need 485 s for its 7.
    assert content["summary"]["grid_per_class"] == 2
    summary, images = judged(tmp_path, grid_per_class=2)
    assert content["images"] == images
    assert content["summary"]["grid_top1_pct"] == summary.grid_top1_pct
    # The fast one judged all views of its 5 images, the slow one of 3 of them.
    both = landscape_files.read(tmp_path / "map")
    assert both is not None
    assert both.about["images_per_class"] == 3
