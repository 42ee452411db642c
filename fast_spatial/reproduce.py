"""The published table: train and evaluate a list of rows, skipping what is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_spatial.config import (
    DIGITS,
    MODES,
    PUBLISHED,
    EvaluateConfig,
    LandscapeConfig,
    LaunchOptions,
    TrainConfig,
    option,
)
from fast_spatial.files import write_json
from fast_spatial.recipe import train_config
from fast_spatial.reporting.report import published_table, results_table, row_name, write_report
from fast_spatial.runlog import say

DIGITS_ROWS = ("nocrop", "standard", "random:30", "worst10:30")
IMAGENET_ROWS = tuple(mode if not degrees else f"{mode}:{degrees:g}" for mode, degrees in PUBLISHED)
# Options of `train` that reproduce decides itself.
DECIDED = ("mode", "degrees", "translate_px", "seed")


@dataclass(frozen=True)
class ReproduceConfig(LaunchOptions):
    """Train and evaluate the rows of the published table, and print ours beside it."""

    data: str = option("", "folder with train/ and val/ (a folder per class), or digits")
    out: str = option("", "folder of the reproduction: a run per row, results.json; rows already there are skipped")
    rows: tuple[str, ...] = option((), "rows as MODE:DEGREES, separated by commas; default all of the table")
    seeds: tuple[int, ...] = option((0,), "train every row once per seed, separated by commas")

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is needed")
        if not self.seeds:
            raise ValueError("--seeds: at least one is needed")
        rows = [split_row(row) for row in self.rows]
        for name, values in (("rows", rows), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {','.join(map(str, getattr(self, name)))}: one of them is named twice")


@dataclass(frozen=True)
class Row:
    """One model to train and judge: its training and its evaluation, in a folder of their own."""

    train: TrainConfig
    evaluate: EvaluateConfig

    @property
    def result_file(self) -> Path:
        """Where the row's result is kept once it is done."""
        return Path(self.train.out) / "result.json"


# Runs a task ("train", "evaluate") with a configuration, after checking it, and returns the seconds it took.
Launch = Callable[[str, Any], float]


def split_row(row: str) -> tuple[str, float]:
    """(mode, degrees) of "MODE:DEGREES" or "MODE"."""
    mode, _, degrees = row.partition(":")
    if mode not in MODES:
        raise ValueError(f"--rows {row}: choose modes of {', '.join(MODES)}, as in random:40")
    try:
        found = float(degrees or 30)
    except ValueError:
        raise ValueError(f"--rows {row}: expected MODE:DEGREES, as in random:40") from None
    if not 0 <= found <= 180:
        raise ValueError(f"--rows {row}: rotations reach from 0 to 180 degrees")
    return mode, found


def plan(config: ReproduceConfig, train_flags: dict[str, str]) -> list[Row]:
    """Every row and seed, as configurations; `train_flags` are raw values of training options.

    Raises:
        ValueError: on a bad training option.

    """
    digits = config.data == DIGITS
    launch = {f.name: getattr(config, f.name) for f in dataclasses.fields(LaunchOptions)}
    rows = []
    for seed in config.seeds:
        for name in config.rows or (DIGITS_ROWS if digits else IMAGENET_ROWS):
            mode, degrees = split_row(name)
            out = Path(config.out) / name.replace(":", "_") / f"seed_{seed}"
            decided = {"data": config.data, "out": str(out), "mode": mode, "degrees": str(degrees), "seed": str(seed)}
            train = train_config({**train_flags, **decided}, launch)
            evaluate = EvaluateConfig(
                checkpoint=str(out / "best.pt"),
                data=config.data,
                json=str(out / "evaluation.json"),
                flip=train.eval_flip,
                exclude=train.exclude,
                allow_partial_classes=train.classes > 0,
                **launch,
            )
            rows.append(Row(train, evaluate))
    return rows


def reproduce(config: ReproduceConfig, rows: list[Row], launch: Launch) -> None:
    """Train and evaluate the rows that are not done, then print and write the table."""
    results = []
    for number, row in enumerate(rows, 1):
        name = row_name(row.train.mode, row.train.degrees) + (
            f", seed {row.train.seed}" if len(config.seeds) > 1 else ""
        )
        if row.result_file.is_file():
            say(f"[{number}/{len(rows)}] {name}: done before")
        else:
            say(f"[{number}/{len(rows)}] {name}: training")
            launch("train", row.train)
            say(f"[{number}/{len(rows)}] {name}: evaluating")
            seconds_evaluate = launch("evaluate", row.evaluate)
            write_json(row.result_file, _result(row, seconds_evaluate))
        results.append(json.loads(row.result_file.read_text(encoding="utf-8")))
        write_json(Path(config.out) / "results.json", results)
        map_landscape(row, launch)
    pilot = ", pilot" if any(row.train.classes or row.train.max_train_images for row in rows) else ""
    table = results_table(results, "ours" + (", digits" if config.data == DIGITS else "") + pilot)
    published = published_table([(r["mode"], r["degrees"]) for r in results])
    deviations = sorted({deviation for r in results for deviation in r.get("deviations", [])})
    judged = ", ".join(["judged at 30 degrees and 24 px", *deviations])
    text = f"Top-1 accuracy in percent, {judged}.\n\n{table}\n\n{published}"
    (Path(config.out) / "results.md").write_text(text + "\n", encoding="utf-8")
    say(f"\n{text}\n\nwritten to {Path(config.out) / 'results.json'} and results.md")
    write_report([Path(config.out)], Path(config.out))


def map_landscape(row: Row, launch: Launch) -> None:
    """Judge all views of a few images, for the report; a row that has its landscape is left alone."""
    from fast_spatial.landscape import FILE  # imports torch

    if (Path(row.train.out) / FILE).is_file():
        return
    shared = {f.name: getattr(row.evaluate, f.name) for f in dataclasses.fields(LaunchOptions)}
    judged = row.evaluate
    say(f"judging every view of a few images, for the report: {row.train.out}")
    config = LandscapeConfig(
        checkpoint=judged.checkpoint,
        data=judged.data,
        out=row.train.out,
        exclude=judged.exclude,
        allow_partial_classes=judged.allow_partial_classes,
        **shared,
    )
    launch("landscape", config)


def _result(row: Row, seconds_evaluate: float) -> dict[str, Any]:
    summary = json.loads(Path(row.evaluate.json).read_text(encoding="utf-8"))["summary"]
    with open(Path(row.train.out) / "log.jsonl", encoding="utf-8") as log:
        seconds_train = json.loads(log.readlines()[-1])["elapsed_sec"]  # of all parts of an interrupted training
    kept = ("natural", "random", "worst10", "worst10_any", "grid")
    return {
        "mode": row.train.mode,
        "degrees": row.train.degrees,
        "seed": row.train.seed,
        **{f"{attack}_top1_pct": summary[f"{attack}_top1_pct"] for attack in kept},
        "num_images": summary["num_images"],
        "deviations": summary["deviations"],
        "seconds_train": round(seconds_train, 1),
        "seconds_evaluate": round(seconds_evaluate, 1),
    }
