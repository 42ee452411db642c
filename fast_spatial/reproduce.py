"""The published table: train and evaluate a list of rows, skipping finished rows."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_spatial import launcher
from fast_spatial.budget.active_plan import ActivePlan
from fast_spatial.budget.planning import Plan
from fast_spatial.config.commands import EvaluateConfig, LandscapeConfig, ReproduceConfig
from fast_spatial.config.modes import DIGITS, row_name
from fast_spatial.config.rows import RowRequest
from fast_spatial.config.train import LaunchOptions, TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.reporting.tables import grid_note, published_table, results_table
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.run_files import BEST, CONFIG, EVALUATION, LANDSCAPE, LOG, RESULT, RESULTS, RESULTS_TABLE
from fast_spatial.runtime.runlog import say


@dataclass(frozen=True)
class Row:
    """A row of the table: one training and its evaluation, in one folder."""

    name: str
    train: TrainConfig
    evaluate: EvaluateConfig

    @property
    def result_file(self) -> Path:
        """The file of the row's result; it exists once the row is finished."""
        return Path(self.train.out) / RESULT


def requested_rows(requests: Iterable[RowRequest]) -> list[Row]:
    """The rows without a budget, under the requested recipe.

    Raises:
        UserError: on an invalid training option.

    """
    return [_row(request.name, request.configure({})) for request in requests]


def planned_rows(plan: Plan) -> list[Row]:
    """The rows of a budget's plan."""
    return [_row(row.name, row.train, row.grid_per_class) for row in plan.rows]


def _row(name: str, train: TrainConfig, grid_per_class: int = 0) -> Row:
    launch = {f.name: getattr(train, f.name) for f in dataclasses.fields(LaunchOptions)}
    evaluate = EvaluateConfig(
        checkpoint=str(Path(train.out) / BEST),
        data=train.data,
        json=str(Path(train.out) / EVALUATION),
        flip=train.eval_flip,
        grid=grid_per_class >= 0,
        grid_per_class=max(0, grid_per_class),
        exclude=train.exclude,
        allow_partial_classes=train.max_classes > 0,
        **launch,
    )
    return Row(name, train, evaluate)


def run_rows(config: ReproduceConfig, rows: list[Row], active: ActivePlan | None = None) -> None:
    """Train and judge the unfinished rows, then print and write the table and the report.

    If a row fails, the others still run.

    Args:
        config: the options of `reproduce`.
        rows: the rows; with a budget, those of its plan.
        active: the plan of a budget, or None.

    Raises:
        SystemExit: at the end, if a row failed.

    """
    results, failed = [], []
    for number, row in enumerate(rows, 1):
        title = f"[{number}/{len(rows)}] {row.name}"
        try:
            if row.result_file.is_file():
                say(f"{title}: already done")
            else:
                _train_and_evaluate(title, row, active)
            results.append(_read_result(row.result_file))
            write_json(Path(config.out) / RESULTS, results)
            _map_landscape(row, active)
        except SystemExit as error:
            if error.code != 1:
                raise  # stopped by a signal
            failed.append(row.name)
            say(f"{title}: failed")  # the launcher has printed the reason
        except UserError as error:
            failed.append(row.name)
            say(f"{title}: failed: {error}")
        except Exception:
            failed.append(row.name)
            traceback.print_exc()
            say(f"{title}: failed")
    if results:
        _write_tables(config, rows, results)
    if results or any((Path(row.train.out) / CONFIG).is_file() for row in rows):
        from fast_spatial.reporting.report import write_report  # Matplotlib is not needed before

        write_report([Path(config.out)], Path(config.out), config.price)
    if failed:
        more = "" if active is None else ", with a larger budget"
        say(f"failed: {'; '.join(failed)}; run the same command again to retry{more}")
        raise SystemExit(1)


def _read_result(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: it is damaged ({error})", "remove it to evaluate this row again") from None
    return found


def _train_and_evaluate(title: str, row: Row, active: ActivePlan | None) -> None:
    deadline = None if active is None else active.training_deadline(row.train)
    say(f"{title}: training")
    launcher.launch("train", row.train, deadline)
    say(f"{title}: evaluating")
    until = None if active is None else active.evaluation_until(row.train)
    seconds_evaluate = launcher.launch("evaluate", row.evaluate, until)
    write_json(row.result_file, _result(row, seconds_evaluate))


def _map_landscape(row: Row, active: ActivePlan | None) -> None:
    """Judge all views of a few images, for the report, unless the row already has its landscape."""
    if (Path(row.train.out) / LANDSCAPE).is_file():
        return
    per_class, until = (0, None) if active is None else active.landscape(row.train)
    if active is not None and not per_class:
        return
    shared = {f.name: getattr(row.evaluate, f.name) for f in dataclasses.fields(LaunchOptions)}
    judged = row.evaluate
    say(f"landscape for the report, all views of a few images: {row.train.out}")
    config = LandscapeConfig(
        checkpoint=judged.checkpoint,
        data=judged.data,
        out=row.train.out,
        images_per_class=per_class,
        exclude=judged.exclude,
        allow_partial_classes=judged.allow_partial_classes,
        **shared,
    )
    launcher.launch("landscape", config, until)


def _write_tables(config: ReproduceConfig, rows: list[Row], results: list[dict[str, Any]]) -> None:
    pilot = ", pilot" if any(row.train.max_classes or row.train.max_train_images for row in rows) else ""
    table = results_table(results, "ours" + (", digits" if config.data == DIGITS else "") + pilot)
    published = published_table([(r["mode"], r["degrees"]) for r in results])
    deviations = sorted({deviation for r in results for deviation in r.get("deviations", [])})
    judged = ", ".join(["judged at 30 degrees and 24 px", *deviations])
    few = grid_note((row_name(r["mode"], r["degrees"]), r) for r in results)
    text = "\n\n".join(filter(None, [f"Top-1 accuracy in percent, {judged}.", few, table, published]))
    (Path(config.out) / RESULTS_TABLE).write_text(text + "\n", encoding="utf-8")
    say(f"\n{text}\n\nwritten to {Path(config.out) / 'results.json'} and results.md")


def _result(row: Row, seconds_evaluate: float) -> dict[str, Any]:
    summary = json.loads(Path(row.evaluate.json).read_text(encoding="utf-8"))["summary"]
    with open(Path(row.train.out) / LOG, encoding="utf-8") as log:
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
        "seconds_train": round(records[-1]["elapsed_sec"], 1),  # over all parts of an interrupted training
        "seconds_evaluate": round(seconds_evaluate, 1),
    }
