"""Reads the folders of runs for a report. Missing or damaged files are reported, and not fatal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fast_spatial.config.fields import from_json, identity
from fast_spatial.config.modes import MODES, row_name
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.evaluation import landscape_files
from fast_spatial.evaluation.landscape_files import Landscape
from fast_spatial.runtime.run_files import CONFIG, ENVIRONMENT, EVALUATION, LOG, PLAN, RESULT, USAGE

Content = TypeVar("Content")


@dataclass(frozen=True)
class Run:
    """One training's folder.

    Attributes:
        folder: the run's folder.
        config: the options of the training.
        starts: a record of every start (`environment.jsonl`).
        log: a record per epoch and evaluation (`log.jsonl`).
        evaluation: the output of `evaluate` (`evaluation.json`), or None.
        result: the output of `reproduce` (`result.json`), or None.
        landscape: the output of `launch.py landscape`, or None.
        problems: a sentence on every unreadable file.

    """

    folder: Path
    config: TrainConfig
    starts: list[dict[str, Any]]
    log: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    result: dict[str, Any] | None
    landscape: Landscape | None
    problems: list[str]

    @property
    def data(self) -> str:
        """The name of the data."""
        return self.config.data.rstrip("/").split("/")[-1]

    @property
    def summary(self) -> dict[str, Any]:
        """The summary of the evaluation, which must exist."""
        assert self.evaluation is not None
        found: dict[str, Any] = self.evaluation["summary"]
        return found

    @property
    def epochs_done(self) -> float:
        """Trained epochs, according to the log."""
        return max((record["epoch"] for record in self.records("train")), default=0)

    @property
    def epochs(self) -> float:
        """The recipe's epochs; with a budget, the trained epochs."""
        return self.epochs_done if self.records("segment") else self.config.epochs

    def records(self, event: str) -> list[dict[str, Any]]:
        """The log's records of an event: "train", "chosen", "evaluation", or "segment"."""
        return [record for record in self.log if record.get("event") == event]


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seeds: one row of a table."""

    name: str
    runs: list[Run] = field(default_factory=list)

    @property
    def first(self) -> Run:
        """The run of the lowest seed."""
        return self.runs[0]

    @property
    def judged(self) -> list[Run]:
        """The runs that were evaluated."""
        return [run for run in self.runs if run.evaluation is not None]

    @property
    def mapped(self) -> Run | None:
        """The first run that has a landscape."""
        return next((run for run in self.runs if run.landscape is not None), None)


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in folders of `train` and `reproduce`.

    Raises:
        UserError: if one of them contains no run.

    """
    found: dict[Path, Run] = {}
    for folder in folders:
        files = [folder / CONFIG, *sorted(folder.glob(f"*/{CONFIG}")), *sorted(folder.glob(f"*/*/{CONFIG}"))]
        runs = {file.parent.resolve(): _read(file.parent) for file in files if file.is_file()}
        if not runs:
            raise UserError(f"{folder}: contains no run", "name the --out folder of train or reproduce")
        found.update(runs)
    return list(found.values())


@dataclass(frozen=True)
class Spent:
    """A budget: the request and its plan (`plan.json`), and the running time so far in seconds."""

    folder: Path
    plan: dict[str, Any]
    used_sec: float


def find_budgets(folders: Sequence[Path]) -> list[Spent]:
    """The budgets of folders of `train` and `reproduce`, without unreadable ones."""
    found = []
    for folder in folders:
        try:
            plan = _json(folder / PLAN, (folder / PLAN).read_text(encoding="utf-8"))
            parts = _json(folder / USAGE, (folder / USAGE).read_text(encoding="utf-8"))["parts"]
            found.append(Spent(folder, plan, sum(part["seconds"] for part in parts)))
        except (OSError, UserError, UnicodeDecodeError, KeyError, TypeError):
            continue
    return found


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Runs sorted by mode and degrees, grouped by recipe. Rows with the same name also name their folders."""
    order = list(MODES)
    rows: dict[str, Row] = {}
    for run in sorted(runs, key=lambda r: (order.index(r.config.mode), r.config.degrees, r.config.seed)):
        recipe = {name: value for name, value in identity(run.config).items() if name != "seed"}
        rows.setdefault(json.dumps(recipe), Row(row_name(run.config.mode, run.config.degrees))).runs.append(run)
    names = [row.name for row in rows.values()]
    return [
        row if names.count(row.name) == 1 else Row(f"{row.name} ({row.first.folder})", row.runs)
        for row in rows.values()
    ]


def _read(folder: Path) -> Run:
    problems: list[str] = []

    def attempt(read: Callable[[], Content], otherwise: Content) -> Content:
        try:
            return read()
        except (OSError, UserError, UnicodeDecodeError) as error:
            problems.append(str(error).splitlines()[0])
            return otherwise

    def content(name: str) -> dict[str, Any] | None:
        path = folder / name
        return _json(path, path.read_text(encoding="utf-8")) if path.is_file() else None

    def evaluation() -> dict[str, Any] | None:
        found = content(EVALUATION)
        summary = {} if found is None else found.get("summary")
        if found is not None and not (isinstance(summary, dict) and "num_images" in summary):
            raise UserError(f"{folder / EVALUATION}: it is damaged (no summary)")
        return found

    try:
        config = from_json(TrainConfig, content(CONFIG) or {})
    except (OSError, UserError, ValueError, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: not the file of a run ({str(error).splitlines()[0]})") from None
    return Run(
        folder,
        config,
        attempt(lambda: _lines(folder / ENVIRONMENT), []),
        attempt(lambda: _lines(folder / LOG), []),
        attempt(evaluation, None),
        attempt(lambda: content(RESULT), None),
        attempt(lambda: landscape_files.read(folder), None),
        problems,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file. Its last line may be incomplete while the run continues."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [_json(path, line) for line in whole.splitlines() if line.strip()]


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: it is damaged ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: it is damaged (no object)")
    return found
