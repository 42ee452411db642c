"""A budget while it is spent: the plan is made or found again, and every task gets its part of the time that is left.

OUT/calibration.json   what was measured
OUT/plan.json          the rows, what is left out; a restart goes on with it
OUT/usage.json         the seconds in use (`budget.Clock`)
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_spatial import preflight
from fast_spatial.budget.clock import Budget, Clock, budget_of
from fast_spatial.budget.planning import Plan, PlannedRow, Recipe, candidate_recipes, describe, make_plan
from fast_spatial.config.commands import CalibrateConfig
from fast_spatial.config.fields import differences, to_json
from fast_spatial.config.recipes import REFERENCE, todays_flags
from fast_spatial.config.rows import RowRequest
from fast_spatial.config.train import BudgetOptions, LaunchOptions
from fast_spatial.errors import UserError
from fast_spatial.kernels.spatial import GRID_VIEWS
from fast_spatial.launcher import Launch
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.run_files import CALIBRATION, PLAN
from fast_spatial.runtime.runlog import say
from fast_spatial.training.pacing import Pace
from fast_spatial.training.run_folder import find_latest
from fast_spatial.training.schedule import Timeline, side_starts

# By how much judging may last longer than expected, while other rows still have time that it can take.
_PATIENCE = 0.5
# The last landscape may take so many times as many images as planned, if the time allows.
_LAST_LANDSCAPE = 4
# A row that would get fewer is not begun.
_FEWEST_EPOCHS = 0.5
# Between two decisions of a training's pace: a share of its time.
_INTERVAL = 0.01


@dataclass(frozen=True)
class Asked:
    """What a command asks for.

    Attributes:
        options: the budget, and how processes are started.
        out: the folder.
        flags: the values that were given; a restart has to give the same ones.
        rows: in the order in which they are to be run.
        recipe: by name; empty: one that suits the budget.
        data: what is trained on.
        judged: whether rows are evaluated, mapped and reported, or trained alone.
        may_drop: whether rows may be left out.

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
        """Those that the budget may choose from."""
        return candidate_recipes(self.recipe, self.data, self.rows)


class Spending:
    """The plan, and the time that is left.

    Args:
        plan: of the rows.
        budget: that is spent.
        clock: that counts.
        views_per_sec: that are judged in float32.
        classes: of the images.
        most_per_class: images of every class that a landscape may take.

    """

    def __init__(
        self, plan: Plan, budget: Budget, clock: Clock, *, views_per_sec: float, classes: int, most_per_class: int
    ) -> None:
        self.plan, self._budget, self._clock = plan, budget, clock
        self.round_sec = GRID_VIEWS * classes / views_per_sec
        self.most_per_class = most_per_class

    @property
    def end(self) -> float:
        """When the last task has to be done, in seconds of `time.monotonic()`."""
        return self._budget.until(self._clock) - self.plan.end_sec

    def of(self, row: PlannedRow, others: Sequence[PlannedRow]) -> Limits:
        """The limits of a row's tasks, when `others` are still to be done after it."""
        return Limits(self, row, others)


@dataclass(frozen=True)
class Limits:
    """How long the tasks of a row may take; what is asked for is about now."""

    spending: Spending
    row: PlannedRow
    others: Sequence[PlannedRow]

    def pace(self) -> Pace:
        """The time of the training, and of the judging after it.

        Rows share what is left when the judging of all is provided for, so that all are trained for as many epochs;
        what a row has of its training already, it does not get again.

        Raises:
            UserError: if there is too little for a training that was not begun.

        """
        row, now, rest = self.row, time.monotonic(), _rest(self.row)
        left = self.spending.end - now - sum(r.fixed_sec for r in (row, *self.others))
        mine = rest * row.epoch_sec
        epochs = max(0.0, left) / (sum(_rest(r) * r.epoch_sec for r in self.others) + mine) if mine else 0.0
        if rest == 1 and epochs < _FEWEST_EPOCHS:
            raise UserError(
                f"no time is left for {row.name}: {epochs:.2f} epochs of it",
                "give more (the same command, and a larger budget), or see what there is with launch.py report",
            )
        seconds = row.fixed_sec + epochs * mine
        return Pace(
            until=min(now + seconds, self.spending.end),
            after_sec=row.after_sec,
            step_sec=row.step_sec,
            evaluation_sec=row.validation_sec,
            interval_sec=_INTERVAL * seconds,
        )

    def evaluation_until(self) -> float:
        """When the evaluation has to be done; that of the last row may use what its landscape was to have."""
        row, end = self.row, self.spending.end
        if not self.others:
            return end - (row.start_sec + self.spending.round_sec if row.landscape_per_class else 0.0)
        return min(time.monotonic() + row.start_sec + (1 + _PATIENCE) * row.evaluation_sec, end)

    def landscape(self) -> tuple[int, float]:
        """Images of every class (0: none), and when they have to be done; the last row's may use what is left."""
        row, end = self.row, self.spending.end
        left = end - time.monotonic() - row.start_sec
        if not row.landscape_per_class or left < self.spending.round_sec:
            return 0, end
        if self.others:
            seconds = row.start_sec + (1 + _PATIENCE) * row.landscape_sec
            return row.landscape_per_class, min(time.monotonic() + seconds, end)
        return min(self.spending.most_per_class, _LAST_LANDSCAPE * row.landscape_per_class), end


def _rest(row: PlannedRow) -> float:
    """The share of a row's training that is not done yet."""
    try:
        saved = find_latest(Path(row.train.out)).state
    except UserError:  # the training itself will say so
        return 1.0
    if saved is None or "segments" not in saved:
        return 1.0
    return 1.0 - Timeline(saved["segments"]).progress(saved["steps"])


def check(asked: Asked) -> tuple[Budget, dict[str, Any] | None]:
    """The budget, and the plan of an earlier start (None: this is the first one); nothing is written.

    Raises:
        UserError: on a budget that makes no sense here, a training that cannot work, or a folder with another plan.

    """
    if asked.options.nnodes != "1":
        raise UserError(f"--nnodes {asked.options.nnodes}: budgets are for one machine", "leave the budget away")
    gpus = preflight.check_launch(asked.options) if preflight.gpu_count() else 0
    file = asked.out / PLAN
    found = _read(file, "flags", "budget", "begun", "start_sec", "text") if file.is_file() else None
    if found is not None and not found["begun"]:
        found = None  # it was only asked what a plan would be
    if found is not None:
        found["flags"] = todays_flags(found["flags"])
    if found is not None and found["flags"] != asked.flags:
        changed = differences(found["flags"], {**dict.fromkeys(found["flags"]), **asked.flags})
        raise UserError(
            f"--out {asked.out}: it was begun with other flags ({changed})",
            "name a new folder",
        )
    moment = (
        found["budget"]["moment"] if found and found["budget"]["asked"] == f"--until {asked.options.until}" else None
    )
    budget = budget_of(asked.options, gpus, moment)
    if found is not None and found["budget"]["gpus"] != gpus and (asked.options.gpu_hours or asked.options.max_cost):
        raise UserError(
            f"{budget.asked}: it was begun on {found['budget']['gpus']} GPUs, and here are {gpus}",
            "give as many, or --hours",
        )
    if found is None:
        for row in asked.rows:
            preflight.check_train(row.configure(asked.recipes[-1]))
    return budget, found


def open_plan(asked: Asked, budget: Budget, found: dict[str, Any] | None, clock: Clock, launch: Launch) -> Spending:
    """Measure and plan, or go on with the plan that was found; it is printed and written down.

    Raises:
        UserError: on a budget that is too small, or used up.

    """
    left = budget.until(clock) - time.monotonic()
    if left <= 0:
        over = "" if budget.moment is None else f"; it was over at {budget.moment:%Y-%m-%d %H:%M}"
        raise UserError(
            f"{budget.asked}: all of it is used ({clock.used_sec / 3600:.2f} hours in use{over})",
            f"give more, or see what there is: launch.py report {asked.out}",
        )
    recipes = asked.recipes
    if found is None:
        measured, start_sec = _measure(asked, recipes, budget.until(clock), launch)
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
        since_sec = measured["left_sec"] - (budget.until(clock) - time.monotonic())
        used_sec = clock.used_sec - since_sec  # when it was measured what is left
        text = describe(plan, measured, asked=budget.asked, used_sec=used_sec, price=asked.options.price)
        say(text)
    else:
        text = found["text"]
        say(text)
        say(
            f"{budget.asked}: {clock.used_sec:.0f} s of it are used, {left:.0f} s are left; "
            f"the plan above is from the start ({asked.out / PLAN})"
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
    return Spending(
        plan,
        budget,
        clock,
        views_per_sec=measured["views_per_sec"],
        classes=measured["classes"],
        most_per_class=measured["val_images_of_a_class"],
    )


def _measure(asked: Asked, recipes: Sequence[Recipe], until: float, launch: Launch) -> tuple[dict[str, Any], float]:
    """What `calibration.calibrate` finds, and the seconds that a task takes to start and to end."""
    say("measuring how fast this machine trains and judges (seconds for each row, more where it is busy)")
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
    seconds = launch("calibrate", config, until)
    measured = _read(file, "busy_sec", "views_per_sec")
    return measured, max(0.0, seconds - measured["busy_sec"])


def _read(file: Path, *needed: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if missing := {*needed} - found.keys():
            raise KeyError(*sorted(missing))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: it cannot be read ({error})", "name a new folder") from None
    return found
