"""What commit 9f20ae0 left on disk is resumed, judged, reported and continued, under today's names of options.

The files lie in `tests/assets/9f20ae0/`, whose README says how each was made. Only the constants below name options as
they are called today.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fast_spatial import commands, launcher

DATA = Path(__file__).parents[1] / "assets" / "9f20ae0"

# The options that the files hold under other names, and their flags today.
FLAGS = {
    "side": "--image-size",
    "start_side": "--start-size",
    "eval_side": "--eval-size",
    "score_side": "--score-size",
    "score_chunk": "--views-per-forward",
    "accumulate": "--grad-accum-steps",
    "bn_group": "--bn-group-size",
    "classes": "--max-classes",
    "budget": "--max-cost",
}
JUDGE_BATCH = "--views-per-forward"
# What the recipe e24 is asked for as.
E24 = ["--recipe", "fast", "--epochs", "24"]


def flags(**values: object) -> list[str]:
    """The words of a command line, of values by the names that options had."""
    return [f"{FLAGS.get(name, '--' + name.replace('_', '-'))}={value}" for name, value in values.items()]


def today(name: str) -> str:
    """The name that an option's field has today."""
    return FLAGS.get(name, name).removeprefix("--").replace("-", "_")


COMMON = flags(arch="shufflenet_v2_x0_5", global_batch_size=32, accumulate=2, bn_group=16, dtype="float32")
COMMON += ["--deterministic", "--in-process"]
DIGITS = [*COMMON, *flags(data="digits", views=2, start_side=48, side=64, eval_side=56, score_side=32)]
DIGITS += flags(score_chunk=50, classes=5)
TRAINING = ["train", *DIGITS, *flags(mode="worst10", degrees=15, translate_px=8, epochs=6, milestones=4, lr=0.03)]
TRAINING += flags(max_train_images=720, checkpoint_every=2, eval_every=1, seed=0, out="runs/training")
BUDGETED = [*DIGITS, *flags(momentum=0, lr=0.3, max_train_images=320, checkpoint_every=10)]
TABLE = ["reproduce", *BUDGETED, *flags(rows="standard,worst10:30", out="runs/table")]
EVALUATE = ["evaluate", *flags(data="digits", degrees=15, translate_px=8, views=5, json="judged.json"), "--in-process"]
IMAGES = [*COMMON, *flags(data="runs/images", lr=0.1, start_side=32, side=48, eval_side=64)]
LADDER = ["train", *IMAGES, *flags(mode="standard", out="runs/ladder")]
OF_E24 = ["reproduce", *IMAGES, *E24, *flags(rows="standard,worst10:30", score_side=24, classes=4, out="runs/e24")]
# More than was asked for, so that no test waits for the end of a budget, or finds it used up.
HOURS = flags(hours=100)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working copy of the files, and one CPU: the bits of float32 sums depend on the number of threads."""
    shutil.copytree(DATA, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    cpus, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cpus)})
    yield
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def read(file: str | Path) -> Any:
    return json.loads(Path(file).read_text(encoding="utf-8"))


def lines(file: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def replaced(words: Sequence[str], word: str) -> list[str]:
    """A command with another value of a flag that it holds."""
    name = word.partition("=")[0] + "="
    assert any(old.startswith(name) for old in words)
    return [word if old.startswith(name) else old for old in words]


def sha256(tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def computes_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the bits of two parts of a run can be compared: the same kind of CPU, and the same libraries."""
    packages = ("torch", "torchvision", "numba", "numpy", "nvidia-dali-cuda130")
    return all(one[name] == other[name] for name in ("hardware", "cpu_flags", "gpus")) and all(
        one["versions"].get(name) == other["versions"].get(name) for name in packages
    )


# --- a training


def test_a_training_is_resumed_to_the_same_bits(capfd):
    assert commands.main(TRAINING) == 0
    assert "resumed after 93 steps" in capfd.readouterr().out
    whole = read(DATA / "whole.json")
    log = lines("runs/training/log.jsonl")
    chosen = [record["epoch"] for record in log if record["event"] == "chosen"]
    assert chosen == [record["epoch"] for record in log if record["event"] == "train"][-len(chosen) :]
    log = [record for record in log if record["event"] != "chosen"]  # earlier versions did not count them
    assert [record["event"] for record in log] == [record["event"] for record in whole["log"]]
    saved = torch.load("runs/training/last.pt", weights_only=True)
    assert saved["steps"] == 132
    before, now = lines("runs/training/environment.jsonl")
    if computes_alike(before, now):
        assert [{name: record[name] for name in expected} for record, expected in zip(log, whole["log"])] == whole[
            "log"
        ]
        momentum = saved["optimizer"]["state"]
        assert sha256(sorted(saved["model"].items())) == whole["model_sha256"]
        assert sha256([(str(k), momentum[k]["momentum_buffer"]) for k in sorted(momentum)]) == whole["momentum_sha256"]
    else:
        for record, expected in zip(log, whole["log"]):
            assert record["loss"] == pytest.approx(expected["loss"], rel=0.02)
            assert record["top1_pct"] == pytest.approx(expected["top1_pct"], abs=1.0)


OTHERS = {"side": 80, "start_side": 0, "eval_side": 72, "score_side": 24, "accumulate": 1, "bn_group": 8, "classes": 4}


@pytest.mark.parametrize("name", OTHERS)
def test_a_training_with_another_value_is_refused(name, capfd):
    there = read("runs/training/config.json")[name]
    assert commands.main(replaced(TRAINING, *flags(**{name: OTHERS[name]}))) == 2
    said = capfd.readouterr().err
    assert today(name) in said.replace("-", "_") and f"{there} saved, {OTHERS[name]} given" in said


def test_what_does_not_decide_the_numbers_may_change(monkeypatch):
    config = planned(monkeypatch, replaced(TRAINING, *flags(score_chunk=7)))
    assert getattr(config, today("score_chunk")) == 7


def test_a_checkpoint_of_another_training_is_refused(capfd):
    """The checkpoint has a list of its own of what decides the numbers."""
    config = read("runs/training/config.json")
    Path("runs/training/config.json").write_text(json.dumps({**config, "accumulate": 1}))
    assert commands.main(replaced(TRAINING, *flags(accumulate=1))) == 2
    assert "2 saved, 1 given" in capfd.readouterr().err


@pytest.fixture
def repeated() -> list[str]:
    """The command that repeats the first 12 steps of the table's first row."""
    folder = Path("runs/short")
    folder.mkdir()
    shutil.copy("runs/table/standard/seed_0/config.json", folder)
    records = lines("runs/table/standard/seed_0/log.jsonl")
    segment = next(record for record in records if record["event"] == "segment")
    (folder / "log.jsonl").write_text(json.dumps({**segment, "end": 12}) + "\n")
    return ["train", *BUDGETED, *flags(mode="standard", recipe="digits_linear", replay=folder, out="runs/again")]


def test_a_training_in_a_budget_is_repeated(repeated):
    assert commands.main(repeated) == 0
    assert torch.load("runs/again/last.pt", weights_only=True)["steps"] == 12


def test_another_training_repeats_nothing(repeated, capfd):
    assert commands.main(replaced(repeated, *flags(bn_group=8))) == 2
    assert "16 saved, 8 given" in capfd.readouterr().err
    Path("runs/short/config.json").write_text("[]")
    assert commands.main(repeated) == 2
    assert "config.json cannot be read (no object)" in capfd.readouterr().err


# --- a checkpoint


def judged(checkpoint: str, *words: str) -> Any:
    assert commands.main([*EVALUATE, *flags(checkpoint=checkpoint), *words]) == 0
    return read("judged.json")


def test_a_checkpoint_is_judged_image_by_image_as_it_was():
    """At the side that its evaluations had, which the command does not name."""
    before = read(DATA / "training" / "evaluation.json")
    after = judged("runs/training/last.pt", f"{JUDGE_BATCH}=200", "--grid-per-class=1")
    assert len(before["images"]) == 142 and before["near_ties"] == []
    assert {image["grid"] for image in before["images"]} == {None, True, False}
    for image, expected in zip(after["images"], before["images"], strict=True):
        assert image.pop("natural_margin") == pytest.approx(expected.pop("natural_margin"), abs=1e-3)
        assert image == expected
    assert {name: after["summary"][name] for name in before["summary"]} == before["summary"]


def test_the_side_of_a_checkpoint_is_not_the_only_one():
    """What the verdicts would be if the checkpoint's side went unread: that they are others shows that it is read."""
    before = read(DATA / "training" / "evaluation.json")
    after = judged("runs/training/last.pt", "--no-grid", *flags(side=64))
    assert [image["worst10"] for image in after["images"]] != [image["worst10"] for image in before["images"]]


def test_an_exported_model_is_judged_as_its_checkpoint_was():
    content = torch.load("runs/training/last.pt", weights_only=True)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    values = {"classes": content["classes"], "side": 56, "mean": mean, "std": std}
    about = {"format": "fast_spatial 1", "arch": content["arch"]}
    weights = {name: value.contiguous() for name, value in content["model"].items()}
    save_file(weights, "old.safetensors", about | {name: json.dumps(v) for name, v in values.items()})
    before = read(DATA / "training" / "evaluation.json")["images"]
    after = judged("old.safetensors", "--no-grid")["images"]
    kept = ("path", "label", "natural", "random", "worst10", "worst10_any")
    assert [[image[name] for name in kept] for image in after] == [[image[name] for name in kept] for image in before]


# --- a report


def cells(text: str, first: str) -> list[list[str]]:
    """The cells of the tables' lines that begin so."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return [row[1:] for row in found if row[0] == first]


def test_a_table_is_reported():
    assert commands.main(["report", "runs/table"]) == 0
    text = Path("runs/table/report.md").read_text(encoding="utf-8")
    result, *_ = cells(text, "standard")
    assert [cell.split(" ")[0] for cell in result] == ["96.5", "73.2", "16.9", "0.0"]
    deviating = {
        name: cells(text, f"`{flag}`") for name, flag in FLAGS.items() if name not in ("budget", "score_chunk")
    }
    assert {name: row[-1] for name, (row,) in deviating.items()} == {
        **{"side": "64", "start_side": "48", "eval_side": "56", "score_side": "32"},
        **{"accumulate": "2", "bn_group": "16", "classes": "5"},
    }
    assert ["digits_linear", "67.1", "53.1", "63"] in cells(text, "standard")  # of the budget
    assert "15 validation images, as many of every class" in text  # of the landscape
    assert "cannot be read" not in text and "damaged" not in text


def test_a_training_that_goes_on_is_reported():
    assert commands.main(["report", "runs/training"]) == 0
    text = Path("runs/training/report.md").read_text(encoding="utf-8")
    assert [row[-1] for row in cells(text, f"`{FLAGS['side']}`")] == ["64"]


# --- a plan


def planned(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> Any:
    """The first training that a command starts; it is broken off before anything is done."""
    found = []

    def start(task: str, config: Any, limit: object = None) -> float:
        found.append((task, config))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "launch", start)
        assert commands.main(words) == 130
    ((task, config),) = found
    assert task == "train"
    return config


PLANS = {
    "table": (TABLE, "runs/table/worst10_30/seed_0"),
    "e24": (OF_E24, "runs/e24/standard/seed_0"),
    "ladder": (LADDER, "runs/ladder"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_goes_on_with_the_training_that_was_begun(name, monkeypatch, capfd):
    """With its recipe and all of its values; and once more, since the plan is written down anew."""
    words, folder = PLANS[name]
    begun = read(Path(folder) / "config.json")
    for _ in range(2):
        config = planned(monkeypatch, [*words, *HOURS])
        said = capfd.readouterr().out
        assert "the plan above is from the first start" in said
        assert ("[1/2] standard: already done" in said) == (name == "table")
        now = {name: getattr(config, today(name)) for name in begun.keys() - {"recipe", "hours"}}
        assert {name: list(v) if isinstance(v, tuple) else v for name, v in now.items()} == {
            name: begun[name] for name in now
        }


def test_the_plans_are_of_the_recipes_that_this_is_about():
    plans = {name: read(f"runs/{name}/plan.json") for name in PLANS}
    assert all(plan["begun"] for plan in plans.values())
    assert [plan["rows"][0]["train"]["recipe"] for plan in plans.values()] == ["digits_linear", "e24", "e24"]
    assert [plan["flags"].get("recipe") for plan in plans.values()] == [None, "e24", None]
    named = {name for plan in plans.values() for name in plan["flags"]}
    assert FLAGS.keys() - named == {"score_chunk", "budget"}  # which decide no numbers


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_with_another_value_is_refused(name, capfd):
    there = read("runs/table/plan.json")["flags"][name]
    assert commands.main([*replaced(TABLE, *flags(**{name: OTHERS[name]})), *HOURS]) == 2
    assert f"{there} saved, {OTHERS[name]} given" in capfd.readouterr().err


def test_a_plan_with_another_recipe_is_refused(capfd):
    words = [word for word in OF_E24 if word not in E24] + flags(recipe="reference")
    assert commands.main([*words, *HOURS]) == 2
    assert "contains a plan with different flags" in capfd.readouterr().err


@pytest.mark.slow
def test_a_table_is_finished(monkeypatch):
    """All of its second row, in the minute that this leaves of the budget."""
    plan, usage = read("runs/table/plan.json"), Path("runs/table/usage.json")
    (part,) = read(usage)["parts"]
    usage.write_text(json.dumps({"parts": [{**part, "seconds": plan["budget"]["hours"] * 3600 - 60}]}))
    monkeypatch.setattr(commands, "STARTED", time.monotonic())
    assert commands.main([*TABLE, *flags(hours=plan["budget"]["hours"])]) == 0
    assert [result["mode"] for result in read("runs/table/results.json")] == ["standard", "worst10"]
    assert read("runs/table/results.json")[0] == read(DATA / "table" / "results.json")[0]
    log = lines("runs/table/worst10_30/seed_0/log.jsonl")
    assert {"segment", "train", "evaluation"} <= {record["event"] for record in log}
    text = Path("runs/table/report.md").read_text(encoding="utf-8")
    assert len(cells(text, "worst10, 30 degrees")) > 1
