"""The published table: train and evaluate a list of rows, skipping what is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_spatial.config import (
    DIGITS,
    MODES,
    PUBLISHED,
    BudgetOptions,
    EvaluateConfig,
    LandscapeConfig,
    LaunchOptions,
    TrainConfig,
    option,
)
from fast_spatial.files import write_json
from fast_spatial.pacing import Pace
from fast_spatial.recipe import train_config
from fast_spatial.reporting.report import grid_note, published_table, results_table, row_name, write_report
from fast_spatial.runlog import say

if TYPE_CHECKING:  # imports torch
    from fast_spatial.spending import Limits, Spending

DIGITS_ROWS = ("nocrop", "standard", "random:30", "worst10:30")
IMAGENET_ROWS = tuple(mode if not degrees else f"{mode}:{degrees:g}" for mode, degrees in PUBLISHED)
# Where not all rows can be trained for long enough, those at the end of this list are left out.
BY_IMPORTANCE = ("standard", "worst10:30", "random:30", "nocrop", "worst10:40", "random:40")
# Options of `train` that reproduce decides itself.
DECIDED = ("mode", "degrees", "translate_px", "seed", "replay")


@dataclass(frozen=True)
class ReproduceConfig(BudgetOptions):
    """Train and evaluate the rows of the published table, and print ours beside it."""

    data: str = option("", "folder with train/ and val/ (a folder per class), or digits")
    out: str = option("", "folder of the reproduction: a run per row, results.json; rows already there are skipped")
    rows: tuple[str, ...] = option((), "rows as MODE:DEGREES, separated by commas; default all of the table")
    seeds: tuple[int, ...] = option((0,), "train every row once per seed, separated by commas")

    def __post_init__(self) -> None:
        super().__post_init__()
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
class RowRequest:
    """A row that is asked for.

    Attributes:
        name: for people.
        configure: its training under a recipe (empty: the one of a training without a budget).
        importance: where not all can be trained for long enough, the lowest is left out first.

    """

    name: str
    configure: Callable[[str], TrainConfig]
    importance: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Row:
    """One model to train and judge: its training and its evaluation, in a folder of their own."""

    name: str
    train: TrainConfig
    evaluate: EvaluateConfig

    @property
    def result_file(self) -> Path:
        """Where the row's result is kept once it is done."""
        return Path(self.train.out) / "result.json"


# Runs a task with a configuration and its limit, a Pace or a time, after checking it; returns the seconds it took.
Launch = Callable[[str, Any, Pace | float | None], float]


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


def requests(config: ReproduceConfig, train_flags: dict[str, str]) -> list[RowRequest]:
    """Every row and seed that is asked for; `train_flags` are raw values of training options."""
    launch = {f.name: getattr(config, f.name) for f in dataclasses.fields(LaunchOptions)}

    def request(seed: int, row: str) -> RowRequest:
        mode, degrees = split_row(row)
        out = Path(config.out) / row.replace(":", "_") / f"seed_{seed}"
        decided = {"data": config.data, "out": str(out), "mode": mode, "degrees": str(degrees), "seed": str(seed)}
        name = row_name(mode, degrees) + (f", seed {seed}" if len(config.seeds) > 1 else "")
        importance = (-seed, -BY_IMPORTANCE.index(row) if row in BY_IMPORTANCE else 0)
        return RowRequest(
            name,
            lambda recipe: train_config({**train_flags, **decided, **({"recipe": recipe} if recipe else {})}, launch),
            importance,
        )

    return [
        request(seed, row)
        for seed in config.seeds
        for row in config.rows or (DIGITS_ROWS if config.data == DIGITS else IMAGENET_ROWS)
    ]


def plan(config: ReproduceConfig, train_flags: dict[str, str]) -> list[Row]:
    """The rows without a budget: of the recipe that is asked for.

    Raises:
        ValueError: on a bad training option.

    """
    rows = requests(config, train_flags)
    return [_row(row.name, row.configure(train_flags.get("recipe", ""))) for row in rows]


def _row(name: str, train: TrainConfig, grid_per_class: int = 0) -> Row:
    launch = {f.name: getattr(train, f.name) for f in dataclasses.fields(LaunchOptions)}
    evaluate = EvaluateConfig(
        checkpoint=str(Path(train.out) / "best.pt"),
        data=train.data,
        json=str(Path(train.out) / "evaluation.json"),
        flip=train.eval_flip,
        grid=grid_per_class >= 0,
        grid_per_class=max(0, grid_per_class),
        exclude=train.exclude,
        allow_partial_classes=train.classes > 0,
        **launch,
    )
    return Row(name, train, evaluate)


def reproduce(config: ReproduceConfig, rows: list[Row], launch: Launch, spending: Spending | None = None) -> None:
    """Train and judge the rows that are not done, then print and write the table and the report.

    A row that fails does not keep the others from being done.

    Args:
        config: what is asked for.
        rows: without a budget; with one, the plan's.
        launch: runs a task.
        spending: the budget, if there is one.

    Raises:
        SystemExit: at the end, if a row failed.

    """
    planned = {} if spending is None else {row.train.out: row for row in spending.plan.rows}
    if spending is not None:
        rows = [_row(row.name, row.train, row.grid_per_class) for row in spending.plan.rows]
    results, failed = [], []
    for number, row in enumerate(rows, 1):
        title = f"[{number}/{len(rows)}] {row.name}"
        later = [other for other in rows[number:] if not other.result_file.is_file()]
        limits = None
        if spending is not None:
            limits = spending.of(planned[row.train.out], [planned[other.train.out] for other in later])
        try:
            if row.result_file.is_file():
                say(f"{title}: done before")
            else:
                _train_and_evaluate(title, row, launch, limits)
            results.append(json.loads(row.result_file.read_text(encoding="utf-8")))
            write_json(Path(config.out) / "results.json", results)
            map_landscape(row, launch, limits)
        except (ValueError, RuntimeError, SystemExit) as error:
            if isinstance(error, SystemExit) and error.code != 1:
                raise  # it was asked to stop
            failed.append(row.name)
            reason = "" if isinstance(error, SystemExit) else f": {error}"
            say(f"{title}: failed{reason}")
    if results:
        _write_tables(config, rows, results)
    if results or any((Path(row.train.out) / "config.json").is_file() for row in rows):
        write_report([Path(config.out)], Path(config.out), config.price)
    if failed:
        more = "" if spending is None else ", with a larger budget"
        say(f"failed: {'; '.join(failed)}; the same command tries them again{more}")
        raise SystemExit(1)


def _train_and_evaluate(title: str, row: Row, launch: Launch, limits: Limits | None) -> None:
    pace = None if limits is None else limits.pace()
    say(f"{title}: training")
    launch("train", row.train, pace)
    say(f"{title}: evaluating")
    seconds_evaluate = launch("evaluate", row.evaluate, None if limits is None else limits.evaluation_until())
    write_json(row.result_file, _result(row, seconds_evaluate))


def map_landscape(row: Row, launch: Launch, limits: Limits | None = None) -> None:
    """Judge all views of a few images, for the report; a row that has its landscape is left alone."""
    from fast_spatial.landscape import FILE  # imports torch

    if (Path(row.train.out) / FILE).is_file():
        return
    per_class, until = (0, None) if limits is None else limits.landscape()
    if limits is not None and not per_class:
        return
    shared = {f.name: getattr(row.evaluate, f.name) for f in dataclasses.fields(LaunchOptions)}
    judged = row.evaluate
    say(f"judging every view of a few images, for the report: {row.train.out}")
    config = LandscapeConfig(
        checkpoint=judged.checkpoint,
        data=judged.data,
        out=row.train.out,
        images_per_class=per_class,
        exclude=judged.exclude,
        allow_partial_classes=judged.allow_partial_classes,
        **shared,
    )
    launch("landscape", config, until)


def _write_tables(config: ReproduceConfig, rows: list[Row], results: list[dict[str, Any]]) -> None:
    pilot = ", pilot" if any(row.train.classes or row.train.max_train_images for row in rows) else ""
    table = results_table(results, "ours" + (", digits" if config.data == DIGITS else "") + pilot)
    published = published_table([(r["mode"], r["degrees"]) for r in results])
    deviations = sorted({deviation for r in results for deviation in r.get("deviations", [])})
    judged = ", ".join(["judged at 30 degrees and 24 px", *deviations])
    few = grid_note((row_name(r["mode"], r["degrees"]), r) for r in results)
    text = "\n\n".join(filter(None, [f"Top-1 accuracy in percent, {judged}.", few, table, published]))
    (Path(config.out) / "results.md").write_text(text + "\n", encoding="utf-8")
    say(f"\n{text}\n\nwritten to {Path(config.out) / 'results.json'} and results.md")


def _result(row: Row, seconds_evaluate: float) -> dict[str, Any]:
    summary = json.loads(Path(row.evaluate.json).read_text(encoding="utf-8"))["summary"]
    with open(Path(row.train.out) / "log.jsonl", encoding="utf-8") as log:
        records = [json.loads(line) for line in log]
    kept = ("natural", "random", "worst10", "worst10_any", "grid")
    return {
        "mode": row.train.mode,
        "degrees": row.train.degrees,
        "seed": row.train.seed,
        "epochs": [record["epoch"] for record in records if record["event"] == "train"][-1],
        **{f"{attack}_top1_pct": summary[f"{attack}_top1_pct"] for attack in kept},
        "num_images": summary["num_images"],
        "grid_num_images": summary["grid_num_images"],
        "deviations": summary["deviations"],
        "seconds_train": round(records[-1]["elapsed_sec"], 1),  # of all parts of an interrupted training
        "seconds_evaluate": round(seconds_evaluate, 1),
    }
