"""The report's sections on what the runs took, and on the plans of budgets."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fast_spatial.config.recipes import recipe_as_typed
from fast_spatial.reporting.document import Block, Table, Text
from fast_spatial.reporting.runs import Row, Run, Spent
from fast_spatial.reporting.tables import DASH
from fast_spatial.runtime.text import duration

_HEAD = ("trained as", "GPUs", "training", "evaluation", "GPU-hours", "price", "images/s", "kWh")


def cost(rows: Sequence[Row], price: float) -> list[Block]:
    """Hours, GPU-hours, money, images/s and energy of every run."""
    runs = [(row, run) for row in rows for run in row.runs if run.log]
    if not runs:
        return [Text("No run here has a log yet.")]
    lines = [_line(row, run, price) for row, run in runs]
    told = [i for i in range(len(_HEAD)) if any(line[i] != DASH for line in lines)]
    table = Table([_HEAD[i] for i in told], [[line[i] for i in told] for line in lines])
    notes = _notes([run for _, run in runs], price)
    if without := [str(run.folder) for row in rows for run in row.runs if not run.log]:
        notes.append(f"Without a log, and so not in the table: {'; '.join(without)}.")
    return [table, Text(" ".join(notes))]


def _line(row: Row, run: Run, price: float) -> list[str]:
    gpus, gpu_hours, kwh = _gpus(run), _gpu_hours(run), _kwh(run)
    evaluate_sec = _evaluate_sec(run)
    rates = [record["images_per_sec"] for record in run.records("train")]
    return [
        row.name if len(row.runs) == 1 else f"{row.name}, seed {run.config.seed}",
        str(gpus or DASH),
        duration(run.log[-1]["elapsed_sec"]),
        DASH if evaluate_sec is None else duration(evaluate_sec),
        f"{gpu_hours:.2f}" if gpus else DASH,
        f"{price * gpu_hours:.2f}" if gpus and price else DASH,
        f"{statistics.median(rates):,.0f}" if rates else DASH,
        DASH if kwh is None else f"{kwh:.3f}",
    ]


def _notes(runs: Sequence[Run], price: float) -> list[str]:
    notes = ["Times are of the clock on the wall; images/s is the median epoch's, training alone."]
    if any(_gpus(run) for run in runs):
        total = sum(_gpu_hours(run) for run in runs)
        notes.append(
            f"All of it took {total:.2f} GPU-hours, landscapes and the evaluations above included"
            + (f", which come to {price * total:.2f} at {price:g} each." if price else ".")
        )
        if not price:
            notes.append("No price was given (`--price`, of a GPU-hour), so none is shown.")
    else:
        notes.append("These runs used no GPU: there are no GPU-hours, and nothing to price.")
    if any(_kwh(run) is not None for run in runs):
        notes.append(
            "kWh is what the first machine's GPUs used while training, by NVML's counters; the rest of the machine is "
            "not in it."
        )
    else:
        notes.append("No energy is in the logs: NVML gave none.")
    return notes


def _gpu_hours(run: Run) -> float:
    """GPU-hours of training, evaluation and landscape."""
    hours: float = run.log[-1].get("gpu_hours", 0.0) + _gpus(run) * (_evaluate_sec(run) or 0.0) / 3600
    if run.landscape is not None:
        hours += run.landscape.about["gpus"] * run.landscape.about["seconds"] / 3600
    return hours


def _evaluate_sec(run: Run) -> float | None:
    return (run.result or {}).get("seconds_evaluate")


def _kwh(run: Run) -> float | None:
    found = [record["energy_kwh"] for record in run.log if "energy_kwh" in record]
    return sum(found) if found else None


def _gpus(run: Run) -> int:
    return int(run.starts[-1]["world_size"]) if run.starts and run.starts[-1].get("gpus") else 0


def spent(rows: Sequence[Row], budgets: Sequence[Spent]) -> list[Block]:
    """The plans of budgets, and their results."""
    runs = {run.folder.resolve(): run for row in rows for run in row.runs}
    blocks: list[Block] = []
    for budget in budgets:
        asked = budget.plan["budget"]
        limit = f", {100 * budget.used_sec / (3600 * asked['hours']):.0f} % of it" if asked.get("hours") else ""
        text = (
            f"`{asked['asked']}`: {duration(budget.used_sec)} were in use when this was written{limit}. Rows are "
            f"planned for equally many epochs; a training takes as many steps as its time allows, and its learning "
            f"rate is down at the last one, but where it says stopped."
        )
        head = ["trained as", "recipe", "epochs planned", "epochs trained", "decisions on its pace"]
        lines = [_planned(row, runs.get(_folder(budget, row))) for row in budget.plan["rows"]]
        blocks += [Text(text), Table(head, lines, text_columns=2)]
        blocks += [Text(f"Left out: {reason}.") for reason in budget.plan["left_out"]]
    return blocks


def _folder(budget: Spent, row: dict[str, Any]) -> Path:
    """The folder of a planned training, which may have been moved together with the plan."""
    out = Path(row["train"]["out"])
    inside = budget.folder.joinpath(*out.parts[-2:])  # ROW/seed_N in the folder of `reproduce`
    return (inside if inside.is_dir() else budget.folder).resolve()


def _planned(row: dict[str, Any], run: Run | None) -> list[str]:
    """A row of a plan, and what its training came to."""
    segments = [] if run is None else run.records("segment")
    stopped = bool(segments) and segments[-1]["start"] == segments[-1]["end"]
    return [
        row["name"],
        recipe_as_typed(str(row["train"]["recipe"]), row["train"]["epochs"]),
        f"{row['epochs']:.1f}",
        DASH if run is None else f"{run.epochs_done:.1f}{', stopped' if stopped else ''}",
        str(len(segments) or DASH),
    ]
