"""The reproduction: which rows it trains and judges, what it skips, and the table it ends in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fast_spatial import commands, launcher, reproduce
from fast_spatial.config import recipes
from fast_spatial.config.commands import EvaluateConfig, LandscapeConfig, ReproduceConfig
from fast_spatial.config.fields import parse, to_json
from fast_spatial.config.modes import row_name, split_row
from fast_spatial.config.rows import requests
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.reporting.tables import grid_note, published_table, results_table
from fast_spatial.reproduce import Row, requested_rows

KEYS = [
    *("mode", "degrees", "seed", "epochs"),
    *("natural_top1_pct", "random_top1_pct", "worst10_top1_pct", "worst10_any_top1_pct", "grid_top1_pct"),
    *("num_images", "grid_num_images", "deviations", "seconds_train", "seconds_evaluate"),
]


def result(mode: str, degrees: float, *values: float, seed: int = 0) -> dict[str, Any]:
    names = ("natural_top1_pct", "random_top1_pct", "worst10_top1_pct", "grid_top1_pct")
    return {"mode": mode, "degrees": degrees, "seed": seed, **dict(zip(names, values, strict=True))}


def plan(config: ReproduceConfig, train_flags: dict[str, str]) -> list[Row]:
    return requested_rows(requests(config, train_flags))


def rows_of(text: str) -> list[tuple[str, float]]:
    config = ReproduceConfig(data="digits", out="runs", rows=tuple(text.split(",")))
    return [(row.train.mode, row.train.degrees) for row in plan(config, {})]


# --- tables


def test_a_table_of_one_seed_shows_the_values_to_one_digit():
    table = results_table(
        [result("standard", 30.0, 71.26, 60.6, 39.94, 20.9), result("worst10", 40.0, 100.0, 67.2, 59.3, 8.0)], "ours"
    )
    assert table.splitlines() == [
        "| ours                | Natural | Random | Worst-of-10 | Exhaustive (775) |",
        "| ------------------- | ------: | -----: | ----------: | ---------------: |",
        "| standard            |    71.3 |   60.6 |        39.9 |             20.9 |",
        "| worst10, 40 degrees |   100.0 |   67.2 |        59.3 |              8.0 |",
    ]


def test_a_table_of_several_seeds_shows_the_mean_and_half_the_range():
    seeds = [(70.0, 50.0, 30.0, 0.0), (71.0, 50.0, 36.0, 0.0), (75.0, 50.0, 33.0, 0.6)]
    results = [result("random", 30.0, *values, seed=seed) for seed, values in enumerate(seeds)]
    (row,) = results_table(results, "ours").splitlines()[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["random, 30 degrees", "72.0 ±2.5", "50.0 ±0.0", "33.0 ±3.0", "0.2 ±0.3"]


def test_a_grid_without_a_result_is_a_dash_and_one_on_few_images_is_noted():
    few = {**result("standard", 30.0, 70.0, 1, 1, 20.0), "num_images": 50_000, "grid_num_images": 7000}
    none = {**result("worst10", 30.0, 71.0, 1, 1, 0.0), "grid_top1_pct": None, "num_images": 300, "grid_num_images": 0}
    table = results_table([few, none], "ours").splitlines()
    assert [line.split("|")[5].strip() for line in table[2:]] == ["20.0", "–"]
    named = [("standard", few), ("worst10", none), ("nocrop", {"num_images": 300})]
    assert grid_note(named) == (
        "The grid met fewer images than the other attacks: 7,000 of 50,000 (standard); none of 300 (worst10)."
    )
    assert grid_note(named[2:]) == ""


def test_rows_of_different_limits_are_not_averaged():
    results = [result("random", 30.0, 70.0, 1, 1, 1), result("random", 40.0, 60.0, 1, 1, 1)]
    assert [line.split("|")[2].strip() for line in results_table(results, "ours").splitlines()[2:]] == ["70.0", "60.0"]


def test_the_published_table_has_the_rows_asked_for_in_the_papers_order():
    table = published_table([("worst10", 30.0), ("random", 40.0), ("standard", 30.0)])
    assert table.splitlines() == [
        "| published, ImageNet | Natural | Random | Worst-of-10 | Exhaustive (775) |",
        "| ------------------- | ------: | -----: | ----------: | ---------------: |",
        "| standard            |    71.3 |   60.6 |        39.9 |             20.9 |",
        "| random, 40 degrees  |    68.3 |   67.7 |        54.9 |             38.8 |",
        "| worst10, 30 degrees |    69.1 |   68.0 |        59.4 |             48.1 |",
    ]


def test_modes_without_warps_are_published_once_whatever_the_degrees():
    (row,) = published_table([("nocrop", 0.0), ("nocrop", 30.0), ("nocrop", 40.0)]).splitlines()[2:]
    assert row.startswith("| nocrop ") and "65.4" in row


def test_limits_nobody_published_have_no_published_row():
    assert len(published_table([("random", 35.0)]).splitlines()) == 2


@pytest.mark.parametrize(
    "table",
    [
        published_table([("standard", 30.0), ("worst10", 40.0)]),
        results_table([result("random", 22.5, 9.0, 10.0, 100.0, 0.0)], "a title of our own that is rather long"),
        results_table([result("random", 30.0, v, v, v, v, seed=s) for s, v in enumerate([9.0, 100.0])], "ours"),
    ],
)
def test_tables_are_aligned_markdown(table):
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(m.start() for m in re.finditer(r"\|", line)) for line in lines}) == 1
    assert re.fullmatch(r"\| -+ (\| -+: ){4}\|", lines[1])


@pytest.mark.parametrize(
    ("mode", "degrees", "name"),
    [
        ("standard", 30.0, "standard"),
        ("nocrop", 0.0, "nocrop"),
        ("random", 40.0, "random, 40 degrees"),
        ("worst10", 22.5, "worst10, 22.5 degrees"),
    ],
)
def test_names_of_rows(mode, degrees, name):
    assert row_name(mode, degrees) == name


# --- the plan


@pytest.mark.parametrize(
    ("row", "found"),
    [("random:40", ("random", 40.0)), ("worst10", ("worst10", 30.0)), ("random:22.5", ("random", 22.5))],
)
def test_a_row_is_a_mode_and_its_degrees(row, found):
    assert split_row(row) == found


@pytest.mark.parametrize("row", ["fast:30", "", ":30", "worst-of-10:30"])
def test_a_row_of_no_mode_is_refused(row):
    message = f"^--rows {row}: choose a mode of nocrop, standard, random, worst10, as in random:40$"
    with pytest.raises(UserError, match=message):
        split_row(row)


@pytest.mark.parametrize("row", ["random:x", "random:30deg", "random:30:24"])
def test_a_row_of_no_degrees_is_refused(row):
    with pytest.raises(UserError, match=f"^--rows {row}: expected MODE:DEGREES, as in random:40$"):
        split_row(row)


@pytest.mark.parametrize("row", ["random:500", "random:-30", "random:nan"])
def test_a_row_beyond_the_limits_is_refused(row):
    with pytest.raises(UserError, match=f"^--rows {row}: "):
        plan(ReproduceConfig(data="digits", out="runs", rows=(row,)), {})


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ({"seeds": "0,0"}, "--seeds"),
        ({"rows": "random:30,random:30"}, "--rows"),
        ({"rows": "random,random:30"}, "--rows"),
    ],
)
def test_a_row_or_seed_named_twice_is_refused_as_its_spread_would_be_zero(words, flag):
    with pytest.raises(UserError, match=f"^{flag}"):
        plan(parse(ReproduceConfig, {"data": "digits", "out": "runs", **words}), {})


def test_the_digits_have_four_rows_by_default():
    rows = plan(ReproduceConfig(data="digits", out="runs"), {})
    assert [(row.train.mode, row.train.degrees) for row in rows] == [
        ("nocrop", 30.0),
        ("standard", 30.0),
        ("random", 30.0),
        ("worst10", 30.0),
    ]
    for row in rows:
        assert {name: getattr(row.train, name) for name in recipes.load("digits")} == recipes.load("digits")


def test_a_folder_has_the_published_rows_by_default():
    rows = plan(ReproduceConfig(data="imagenet", out="runs"), {})
    assert [(row.train.mode, row.train.degrees) for row in rows] == [
        ("standard", 30.0),
        ("nocrop", 30.0),
        ("random", 30.0),
        ("random", 40.0),
        ("worst10", 30.0),
        ("worst10", 40.0),
    ]
    assert {(row.train.epochs, row.train.global_batch_size, row.train.image_size) for row in rows} == {(110, 256, 224)}


def test_every_row_and_seed_has_a_folder_of_its_own():
    config = ReproduceConfig(data="digits", out="runs", rows=("standard", "random:40"), seeds=(0, 7))
    rows = plan(config, {})
    assert [(row.train.out, row.train.seed) for row in rows] == [
        ("runs/standard/seed_0", 0),
        ("runs/random_40/seed_0", 0),
        ("runs/standard/seed_7", 7),
        ("runs/random_40/seed_7", 7),
    ]
    last = rows[-1]
    assert last.evaluate.checkpoint == "runs/random_40/seed_7/best.pt"
    assert last.evaluate.json == "runs/random_40/seed_7/evaluation.json"
    assert last.result_file == Path("runs/random_40/seed_7/result.json")


def test_every_row_is_judged_alike_whatever_it_was_trained_with():
    config = ReproduceConfig(data="digits", out="runs", rows=("nocrop", "random:40", "worst10:10"), seeds=(0, 1))
    judged = {
        (row.evaluate.degrees, row.evaluate.translate_px, row.evaluate.views, row.evaluate.seed, row.evaluate.grid)
        for row in plan(config, {"views": "3"})
    }
    assert judged == {(30.0, None, 10, 0, True)}


def test_flags_of_the_recipe_and_of_the_processes_reach_every_row():
    config = ReproduceConfig(data="digits", out="runs", nproc_per_node=2, stall_minutes=5.0)
    for row in plan(config, {"epochs": "3", "lr": "0.2", "views": "4"}):
        assert (row.train.epochs, row.train.lr, row.train.views) == (3, 0.2, 4)
        assert (row.train.nproc_per_node, row.train.stall_minutes) == (2, 5.0)
        assert (row.evaluate.nproc_per_node, row.evaluate.stall_minutes) == (2, 5.0)


def test_a_bad_flag_of_the_recipe_is_refused():
    with pytest.raises(UserError, match=r"^--epochs 0: must be at least 1"):
        plan(ReproduceConfig(data="digits", out="runs"), {"epochs": "0"})


# --- the reproduction


def run(config: ReproduceConfig, rows: list[reproduce.Row], launch: Any) -> None:
    """A reproduction whose tasks a stand-in runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "launch", launch)
        reproduce.run_rows(config, rows)


class FakeLaunch:
    """Stands for training and judging: leaves the files they leave, and can break off."""

    def __init__(self, break_at: int = 0) -> None:
        self.calls: list[tuple[str, str]] = []
        self.break_at = break_at

    def __call__(self, task: str, config: Any, limit: object = None) -> float:
        self.calls.append((task, config.json if task == "evaluate" else config.out))
        if len(self.calls) == self.break_at:
            raise KeyboardInterrupt
        if task == "train":
            assert isinstance(config, TrainConfig)
            Path(config.out).mkdir(parents=True, exist_ok=True)
            (Path(config.out) / "config.json").write_text(json.dumps(to_json(config)))
            (Path(config.out) / "log.jsonl").write_text(
                '{"event": "train", "epoch": 8, "loss": 0.5, "top1_pct": 90.0, "images_per_sec": 9, "elapsed_sec": 1}\n'
                '{"event": "evaluation", "epoch": 8, "elapsed_sec": 12.3}\n'
            )
            return 99.0
        if task == "landscape":
            assert isinstance(config, LandscapeConfig)
            (Path(config.out) / "landscape.json").touch()
            return 1.0
        assert isinstance(config, EvaluateConfig)
        values = {"natural": 99.0, "random": 96.5, "worst10": 88.25, "worst10_any": 87.0, "grid": 49.1}
        summary = {f"{attack}_top1_pct": value for attack, value in values.items()}
        content = {
            "summary": {
                **summary,
                "num_images": 497,
                "grid_num_images": 497,
                "degrees": 30.0,
                "partial": False,
                "deviations": (),
            },
            "images": [],
        }
        Path(config.json).write_text(json.dumps(content))
        return 3.0


@pytest.fixture
def planned(tmp_path):
    """A reproduction of two rows, and the paths of its files."""
    config = ReproduceConfig(data="digits", out=str(tmp_path / "runs"), rows=("standard", "worst10:40"))
    return config, plan(config, {})


def results_of(config: ReproduceConfig) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((Path(config.out) / "results.json").read_text())
    return found


def calls_of(rows: list[Row]) -> list[tuple[str, str]]:
    return [
        call
        for row in rows
        for call in (("train", row.train.out), ("evaluate", row.evaluate.json), ("landscape", row.train.out))
    ]


def test_each_row_is_trained_then_judged_and_written_down(planned):
    config, rows = planned
    launched = FakeLaunch()
    run(config, rows, launched)
    assert launched.calls == calls_of(rows)
    results = results_of(config)
    assert [list(found) for found in results] == [KEYS, KEYS]
    assert list(results[0].values()) == ["standard", 30.0, 0, 8, 99.0, 96.5, 88.25, 87.0, 49.1, 497, 497, [], 12.3, 3.0]
    assert list(results[1].values())[:3] == ["worst10", 40.0, 0]


def test_finished_rows_are_skipped(planned, capsys):
    config, rows = planned
    run(config, rows, FakeLaunch())
    before, again = results_of(config), FakeLaunch()
    capsys.readouterr()
    run(config, rows, again)
    assert again.calls == []
    assert results_of(config) == before
    assert "[2/2] worst10, 40 degrees: already done" in capsys.readouterr().out


def test_a_damaged_result_is_named_and_the_other_rows_go_on(planned, capsys):
    config, rows = planned
    run(config, rows, FakeLaunch())
    rows[0].result_file.write_text("{")
    with pytest.raises(SystemExit):
        run(config, rows, FakeLaunch())
    said = capsys.readouterr().out
    assert f"standard: failed: {rows[0].result_file}: it is damaged" in said
    assert "[2/2] worst10, 40 degrees: already done" in said
    assert [found["mode"] for found in results_of(config)] == ["worst10"]


def test_one_that_was_broken_off_goes_on_with_the_row_it_was_at(planned):
    config, rows = planned
    with pytest.raises(KeyboardInterrupt):
        run(config, rows, FakeLaunch(break_at=5))
    assert [found["mode"] for found in results_of(config)] == ["standard"]
    again = FakeLaunch()
    run(config, rows, again)
    assert again.calls == calls_of(rows[1:])
    assert [found["mode"] for found in results_of(config)] == ["standard", "worst10"]


def test_it_ends_in_our_table_beside_the_published_one(planned, capsys):
    config, rows = planned
    run(config, rows, FakeLaunch())
    text = (Path(config.out) / "results.md").read_text()
    assert "| worst10, 40 degrees |    99.0 |   96.5 |        88.2 |             49.1 |" in text
    assert "| worst10, 40 degrees |    68.6 |   67.2 |        59.3 |             48.4 |" in text
    assert "| ours, digits " in text and "| published, ImageNet " in text
    assert "nocrop" not in text
    assert text.strip() in capsys.readouterr().out
    assert "worst10, 40 degrees" in (Path(config.out) / "report.md").read_text()
    assert (Path(config.out) / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_a_row_without_a_landscape_is_only_given_one(planned):
    config, rows = planned
    run(config, rows, FakeLaunch())
    (Path(rows[1].train.out) / "landscape.json").unlink()
    again = FakeLaunch()
    run(config, rows, again)
    assert again.calls == [("landscape", rows[1].train.out)]


def test_several_seeds_are_named_and_averaged(tmp_path, capsys):
    config = ReproduceConfig(data="digits", out=str(tmp_path), rows=("random:30",), seeds=(0, 1))
    run(config, plan(config, {}), FakeLaunch())
    assert [found["seed"] for found in results_of(config)] == [0, 1]
    out = capsys.readouterr().out
    assert "[2/2] random, 30 degrees, seed 1: training" in out
    assert "99.0 ±0.0" in out


def test_the_command_reproduces(tmp_path, monkeypatch, capsys):
    launched = FakeLaunch()
    monkeypatch.setattr(launcher, "launch", launched)
    words = ["reproduce", "--data", "digits", "--out", str(tmp_path), "--rows", "standard", "--epochs", "1"]
    assert commands.main(words) == 0
    assert [task for task, _ in launched.calls] == ["train", "evaluate", "landscape"]
    assert "| standard     |    99.0 |" in capsys.readouterr().out


def test_the_tables_in_the_readme_are_those_of_the_result_files():
    root = Path(__file__).parents[2]
    assert "<!-- results: digits -->\n| ours, digits" in (root / "README.md").read_text(encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.tables", "--check"]
    checked = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
