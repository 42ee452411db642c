"""A budget in use: the plan is made or resumed, and every task gets its share of the remaining time.

OUT/calibration.json   measured speeds
OUT/plan.json          the rows, and what is left out; a restart continues it
OUT/usage.json         the running time (`usage.UsageMeter`)
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_spatial import launcher, preflight
from fast_spatial.budget.planning import Plan, PlannedRow, Recipe, candidate_recipes, describe, make_plan
from fast_spatial.budget.usage import Budget, UsageMeter, budget_of
from fast_spatial.config.commands import CalibrateConfig
from fast_spatial.config.fields import differences, to_json
from fast_spatial.config.recipes import REFERENCE, todays_flags
from fast_spatial.config.rows import RowRequest
from fast_spatial.config.train import BudgetOptions, LaunchOptions
from fast_spatial.errors import UserError
from fast_spatial.kernels.spatial import GRID_VIEWS
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.run_files import CALIBRATION, PLAN
from fast_spatial.runtime.runlog import say
from fast_spatial.training.checkpoints import find_latest
from fast_spatial.training.pacing import TrainingDeadline
from fast_spatial.training.schedule import Timeline, side_starts

# Judging may exceed its expected time by this share if other rows follow, whose time it then takes.
_PATIENCE = 0.5
# The last landscape may use up to this multiple of the planned images, if time remains.
_LAST_LANDSCAPE = 4
# A row that would get fewer epochs is not started.
_FEWEST_EPOCHS = 0.5
# Interval between two decisions on a training's pace, as a share of its time.
_INTERVAL = 0.01


@dataclass(frozen=True)
class BudgetRequest:
    """A command's request for a plan.

    Attributes:
        options: the options of the budget and of the processes.
        out: the output folder.
        flags: the given values; a restart must give the same ones.
        rows: the requested rows, in order of execution.
        recipe: the recipe's name; empty: one that suits the budget.
        data: the training data.
        judged: whether rows are evaluated, mapped and reported, or only trained.
        may_drop: whether rows may be dropped.

    """

    options: BudgetOptions
    out: Path
    flags: dict[str, str]
    rows: Sequence[RowRequest]
    recipe: str
    data: str
    judged: bool
    may_drop: bool

    @property
    def recipes(self) -> list[Recipe]:
        """The recipes that the budget may choose from."""
        return candidate_recipes(self.recipe, self.data, self.rows)


class ActivePlan:
    """A plan in use, and its remaining time.

    Args:
        plan: the plan.
        budget: the budget.
        usage: the open meter of the run's folder.
        views_per_sec: judged views per second, in float32.
        classes: number of classes.
        most_per_class: most images of every class that a landscape may use.

    """

    def __init__(
        self, plan: Plan, budget: Budget, usage: UsageMeter, *, views_per_sec: float, classes: int, most_per_class: int
    ) -> None:
        self.plan, self._budget, self._usage = plan, budget, usage
        self.round_sec = GRID_VIEWS * classes / views_per_sec
        self.most_per_class = most_per_class

    @property
    def end(self) -> float:
        """Deadline of the last task, in seconds of `time.monotonic()`."""
        return self._budget.until(self._usage) - self.plan.end_sec

    def of(self, row: PlannedRow, others: Sequence[PlannedRow]) -> TimeShare:
        """The time limits of a row's tasks; `others` are the rows after it."""
        return TimeShare(self, row, others)


@dataclass(frozen=True)
class TimeShare:
    """Time limits of a row's tasks, computed from the current time."""

    spending: ActivePlan
    row: PlannedRow
    others: Sequence[PlannedRow]

    def pace(self) -> TrainingDeadline:
        """The pace of the training, with the time for judging after it.

        The rows share the time that remains after all judging, so that all get the same number of epochs. The finished
        part of a training is not planned again.

        Raises:
            UserError: if too little time is left to start a training.

        """
        row, now, rest = self.row, time.monotonic(), _rest(self.row)
        left = self.spending.end - now - sum(r.fixed_sec for r in (row, *self.others))
        mine = rest * row.epoch_sec
        epochs = max(0.0, left) / (sum(_rest(r) * r.epoch_sec for r in self.others) + mine) if mine else 0.0
        if rest == 1 and epochs < _FEWEST_EPOCHS:
            raise UserError(
                f"out of time for {row.name}: only {epochs:.2f} epochs fit",
                "run the same command with a larger budget, or see the results with launch.py report",
            )
        seconds = row.fixed_sec + epochs * mine
        return TrainingDeadline(
            until=min(now + seconds, self.spending.end),
            after_sec=row.after_sec,
            step_sec=row.step_sec,
            evaluation_sec=row.validation_sec,
            interval_sec=_INTERVAL * seconds,
        )

    def evaluation_until(self) -> float:
        """Deadline of the evaluation. The last row's may use all its landscape's time except for one round."""
        row, end = self.row, self.spending.end
        if not self.others:
            return end - (row.start_sec + self.spending.round_sec if row.landscape_per_class else 0.0)
        return min(time.monotonic() + row.start_sec + (1 + _PATIENCE) * row.evaluation_sec, end)

    def landscape(self) -> tuple[int, float]:
        """Images of every class (0: none), and the deadline. The last row's landscape may use all remaining time."""
        row, end = self.row, self.spending.end
        left = end - time.monotonic() - row.start_sec
        if not row.landscape_per_class or left < self.spending.round_sec:
            return 0, end
        if self.others:
            seconds = row.start_sec + (1 + _PATIENCE) * row.landscape_sec
            return row.landscape_per_class, min(time.monotonic() + seconds, end)
        return min(self.spending.most_per_class, _LAST_LANDSCAPE * row.landscape_per_class), end


def _rest(row: PlannedRow) -> float:
    """The unfinished share of a row's training."""
    try:
        saved = find_latest(Path(row.train.out)).state
    except UserError:  # the training reports it
        return 1.0
    if saved is None or "segments" not in saved:
        return 1.0
    return 1.0 - Timeline(saved["segments"]).progress(saved["steps"])


def check(asked: BudgetRequest) -> tuple[Budget, dict[str, Any] | None]:
    """The budget, and the plan of an earlier start (None on the first start). Writes nothing.

    Raises:
        UserError: on an invalid budget, a training that cannot work, or a folder with another plan.

    """
    if asked.options.nnodes != "1":
        raise UserError(f"--nnodes {asked.options.nnodes}: a budget requires one node", "remove the budget")
    gpus = preflight.check_launch(asked.options) if preflight.gpu_count() else 0
    file = asked.out / PLAN
    found = _read(file, "flags", "budget", "begun", "start_sec", "text") if file.is_file() else None
    if found is not None and not found["begun"]:
        found = None  # written by --plan-only, never started
    if found is not None:
        found["flags"] = todays_flags(found["flags"])
    if found is not None and found["flags"] != asked.flags:
        changed = differences(found["flags"], {**dict.fromkeys(found["flags"]), **asked.flags})
        raise UserError(
            f"--out {asked.out}: contains a plan with different flags ({changed})",
            "name a new folder",
        )
    moment = (
        found["budget"]["moment"] if found and found["budget"]["asked"] == f"--until {asked.options.until}" else None
    )
    budget = budget_of(asked.options, gpus, moment)
    if found is not None and found["budget"]["gpus"] != gpus and (asked.options.gpu_hours or asked.options.max_cost):
        raise UserError(
            f"{budget.asked}: the plan was made for {found['budget']['gpus']} GPUs, and {gpus} are visible",
            "use the same number of GPUs, or give --hours",
        )
    if found is None:
        for row in asked.rows:
            preflight.check_train(row.configure(asked.recipes[-1]))
    return budget, found


def open_plan(asked: BudgetRequest, budget: Budget, found: dict[str, Any] | None, usage: UsageMeter) -> ActivePlan:
    """Measure and make a plan, or resume `found`; prints and writes it.

    Raises:
        UserError: if the budget is too small, or used up.

    """
    left = budget.until(usage) - time.monotonic()
    if left <= 0:
        over = "" if budget.moment is None else f"; it ended at {budget.moment:%Y-%m-%d %H:%M}"
        raise UserError(
            f"{budget.asked}: the budget is used up ({usage.used_sec / 3600:.2f} hours of running time{over})",
            f"give a larger budget, or see the results: launch.py report {asked.out}",
        )
    recipes = asked.recipes
    if found is None:
        measured, start_sec = _measure(asked, recipes, budget.until(usage))
    else:
        measured, start_sec = _read(asked.out / CALIBRATION, "left_sec", "views_per_sec"), found["start_sec"]
    plan = make_plan(
        asked.rows,
        recipes,
        measured,
        start_sec=start_sec,
        judged=asked.judged,
        may_drop=asked.may_drop,
        keep_eval_every="eval_every" in asked.flags,
    )
    if found is None:
        since_sec = measured["left_sec"] - (budget.until(usage) - time.monotonic())
        used_sec = usage.used_sec - since_sec  # at the time of the measurement
        text = describe(plan, measured, asked=budget.asked, used_sec=used_sec, price=asked.options.price)
        say(text)
    else:
        text = found["text"]
        say(text)
        say(
            f"{budget.asked}: {usage.used_sec:.0f} s used, {left:.0f} s left; "
            f"the plan above is from the first start ({asked.out / PLAN})"
        )
    if found is None or not asked.options.plan_only:
        content = {
            "flags": asked.flags,
            "begun": not asked.options.plan_only,
            "budget": {
                "asked": budget.asked,
                "hours": budget.hours,
                "moment": budget.moment and budget.moment.isoformat(),
                "gpus": budget.gpus,
            },
            "start_sec": start_sec,
            "rows": plan.to_json(),
            "left_out": plan.left_out,
            "text": text,
        }
        write_json(asked.out / PLAN, content)
    return ActivePlan(
        plan,
        budget,
        usage,
        views_per_sec=measured["views_per_sec"],
        classes=measured["classes"],
        most_per_class=measured["val_images_of_a_class"],
    )


def _measure(asked: BudgetRequest, recipes: Sequence[Recipe], until: float) -> tuple[dict[str, Any], float]:
    """Run the calibration: its findings, and the seconds to start and end a task."""
    say("measuring training and evaluation speed (seconds per row, longer on a busy machine)")
    stretched = [recipe for recipe in recipes if recipe["recipe"] != REFERENCE] or recipes
    trainings = [request.configure(stretched[0]) for request in asked.rows]
    sides = {side for recipe in recipes for _, side in side_starts(asked.rows[0].configure(recipe))}
    shared = {name: getattr(asked.options, name) for name in LaunchOptions.__dataclass_fields__}
    file = asked.out / CALIBRATION
    config = CalibrateConfig(
        trainings=tuple(to_json(training) for training in trainings),
        sides=tuple(sorted(sides)),
        json=str(file),
        **shared,
    )
    seconds = launcher.launch("calibrate", config, until)
    measured = _read(file, "busy_sec", "views_per_sec")
    return measured, max(0.0, seconds - measured["busy_sec"])


def _read(file: Path, *needed: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        if missing := {*needed} - found.keys():
            raise KeyError(*sorted(missing))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: cannot be read ({error})", "name a new folder") from None
    return found
