"""A budget in use: the plan is made or resumed, and every task gets its share of the remaining time.

OUT/calibration.json   measured speeds
OUT/plan.json          the rows, and what is left out; a restart continues it
OUT/usage.json         the running time (`usage.UsageMeter`)
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_spatial import launcher, preflight
from fast_spatial.budget.planning import Plan, PlannedRow, Recipe, candidate_recipes, describe, make_plan
from fast_spatial.budget.usage import Budget, UsageMeter, budget_of, moment_of
from fast_spatial.config.budget_policy import DEFAULT_POLICY, BudgetPolicy
from fast_spatial.config.commands import CalibrateConfig, ReproduceConfig
from fast_spatial.config.fields import differences, to_json
from fast_spatial.config.recipes import REFERENCE, todays_flags
from fast_spatial.config.rows import RowRequest
from fast_spatial.config.train import LaunchOptions, TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import GRID_VIEWS
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.run_files import CALIBRATION, PLAN
from fast_spatial.runtime.runlog import say
from fast_spatial.runtime.text import duration
from fast_spatial.training.pacing import TrainingDeadline
from fast_spatial.training.schedule import Timeline, side_starts


@dataclass(frozen=True)
class BudgetRequest:
    """A command with a budget.

    Attributes:
        config: the options of the command.
        flags: the given values that decide the plan; a restart must give the same ones.
        rows: the requested rows, in order of execution.
        judged: whether the rows are also evaluated, and their landscapes mapped.
        may_drop: whether rows may be left out if the budget is too small for all.

    """

    config: TrainConfig | ReproduceConfig
    flags: dict[str, str]
    rows: Sequence[RowRequest]
    judged: bool = False
    may_drop: bool = False

    @property
    def out(self) -> Path:
        """The output folder."""
        return Path(self.config.out)

    def recipes(self) -> list[Recipe]:
        """The recipes that the budget may choose from.

        Raises:
            UserError: if no recipe fits the other flags.

        """
        return candidate_recipes(self.flags.get("recipe", ""), self.config.data, self.rows)


class ActivePlan:
    """A plan in use: the limits of each task, computed from the current time.

    Rows are named by their trainings. The rows after it that have no result yet share the time with a row.

    Args:
        plan: the plan.
        budget: the budget.
        usage: the open meter of the run's folder.
        measured: the output of the calibration.
        policy: constants of the shares.

    """

    def __init__(
        self,
        plan: Plan,
        budget: Budget,
        usage: UsageMeter,
        measured: dict[str, Any],
        policy: BudgetPolicy = DEFAULT_POLICY,
    ) -> None:
        self.plan, self._budget, self._usage, self._policy = plan, budget, usage, policy
        self._round_sec = GRID_VIEWS * measured["classes"] / measured["views_per_sec"]
        self._most_per_class = measured["val_images_of_a_class"]

    @property
    def end(self) -> float:
        """Deadline of the last task, in seconds of `time.monotonic()`."""
        return self._budget.until(self._usage) - self.plan.end_sec

    def training_deadline(self, train: TrainConfig) -> TrainingDeadline:
        """The deadline of a training, with the time for judging after it.

        The rows share the time that remains after all judging, so that all get the same number of epochs. The finished
        part of a training is not planned again.

        Raises:
            UserError: if too little time is left to start a training.

        """
        row, later = self._row(train)
        now, unfinished = time.monotonic(), _unfinished(row)
        left_sec = self.end - now - sum(r.fixed_sec for r in (row, *later))
        own_sec = unfinished * row.epoch_sec
        all_sec = own_sec + sum(_unfinished(r) * r.epoch_sec for r in later)
        epochs = max(0.0, left_sec) / all_sec if own_sec else 0.0
        if unfinished == 1 and epochs < self._policy.fewest_epochs:
            raise UserError(
                f"out of time for {row.name}: only {epochs:.2f} epochs fit",
                "run the same command with a larger budget, or see the results with launch.py report",
            )
        seconds = row.fixed_sec + epochs * own_sec
        return TrainingDeadline(
            until=min(now + seconds, self.end),
            after_sec=row.after_sec,
            step_sec=row.step_sec,
            evaluation_sec=row.validation_sec,
            interval_sec=self._policy.interval_share * seconds,
        )

    def evaluation_until(self, train: TrainConfig) -> float:
        """Deadline of a row's evaluation. The last row's may use all its landscape's time except for one round."""
        row, later = self._row(train)
        if not later:
            return self.end - (row.judging_start_sec + self._round_sec if row.landscape_per_class else 0.0)
        return self._with_patience(row, row.evaluation_sec)

    def landscape(self, train: TrainConfig) -> tuple[int, float]:
        """Images of every class (0: none), and the deadline. The last row's landscape may use all remaining time."""
        row, later = self._row(train)
        left_sec = self.end - time.monotonic() - row.judging_start_sec
        if not row.landscape_per_class or left_sec < self._round_sec:
            return 0, self.end
        if later:
            return row.landscape_per_class, self._with_patience(row, row.landscape_sec)
        return min(self._most_per_class, self._policy.last_landscape_factor * row.landscape_per_class), self.end

    def _with_patience(self, row: PlannedRow, expected_sec: float) -> float:
        seconds = row.judging_start_sec + (1 + self._policy.judging_patience) * expected_sec
        return min(time.monotonic() + seconds, self.end)

    def _row(self, train: TrainConfig) -> tuple[PlannedRow, list[PlannedRow]]:
        """The row of a training, and the unfinished rows after it."""
        rows = self.plan.rows
        number = [row.train.out for row in rows].index(train.out)
        return rows[number], [row for row in rows[number + 1 :] if not row.is_finished]


def _unfinished(row: PlannedRow) -> float:
    """The unfinished share of a row's training."""
    from fast_spatial.training.checkpoints import find_latest  # imports torch

    try:
        saved = find_latest(Path(row.train.out)).state
    except UserError:  # the training reports it
        return 1.0
    if saved is None or "segments" not in saved:
        return 1.0
    return 1.0 - Timeline(saved["segments"]).progress(saved["steps"])


@contextlib.contextmanager
def open_plan(request: BudgetRequest, started: float) -> Iterator[ActivePlan]:
    """Measure and make a plan, or resume the saved one; prints and writes it. The time counts while it is open.

    Wrong flags are refused before torch is imported, and everything wrong before a file is written.

    Args:
        request: the command.
        started: `time.monotonic()` at the start of this process.

    Raises:
        UserError: on an invalid budget or flag, a training that cannot work, a folder with another plan, or a budget
            that is too small or used up.

    """
    saved, moment = _check_flags(request)
    budget = _check_machine(request, saved, moment)
    with UsageMeter(request.out, started, writes=not request.config.plan_only) as usage:
        left_sec = budget.until(usage) - time.monotonic()
        if left_sec <= 0:
            raise _used_up(request, budget, usage)
        if saved is None:
            yield _make(request, budget, usage)
        else:
            yield _resume(request, budget, usage, saved)


def _check_flags(request: BudgetRequest) -> tuple[dict[str, Any] | None, datetime.datetime | None]:
    """The plan of an earlier start, and the end by --until (None: not given). Refuses wrong flags, without torch."""
    config = request.config
    if "epochs" in request.flags and not request.flags.get("recipe"):
        raise UserError("--epochs conflicts with a budget, which sets the number of epochs", "remove one of them")
    if config.nnodes != "1":
        raise UserError(f"--nnodes {config.nnodes}: a budget requires one node", "remove the budget")
    saved = _saved_plan(request)
    request.recipes()
    if not config.until:
        return saved, None
    if saved is not None and saved["budget"]["asked"] == f"--until {config.until}":
        return saved, datetime.datetime.fromisoformat(saved["budget"]["moment"])
    return saved, moment_of(config.until)


def _saved_plan(request: BudgetRequest) -> dict[str, Any] | None:
    file = request.out / PLAN
    if not file.is_file():
        return None
    saved = _read(file, "flags", "budget", "begun", "start_sec", "text")
    if not saved["begun"]:  # written by --plan-only, never started
        return None
    flags = todays_flags(saved["flags"])
    if flags != request.flags:
        changed = differences(flags, {**dict.fromkeys(flags), **request.flags})
        raise UserError(
            f"--out {request.out}: contains a plan with different flags ({changed})",
            "name a new folder",
        )
    return saved


def _check_machine(request: BudgetRequest, saved: dict[str, Any] | None, moment: datetime.datetime | None) -> Budget:
    """The budget on this machine; refuses trainings that cannot work here."""
    config = request.config
    gpus = preflight.check_launch(config) if preflight.gpu_count() else 0
    budget = budget_of(config, gpus, moment)
    if saved is None:
        recipe = request.recipes()[-1]
        for row in request.rows:
            preflight.check_train(row.configure(recipe))
    elif saved["budget"]["gpus"] != gpus and (config.gpu_hours or config.max_cost):
        raise UserError(
            f"{budget.flag}: the plan was made for {saved['budget']['gpus']} GPUs, and {gpus} are visible",
            "use the same number of GPUs, or give --hours",
        )
    return budget


def _used_up(request: BudgetRequest, budget: Budget, usage: UsageMeter) -> UserError:
    over = "" if budget.moment is None else f"; it ended at {budget.moment:%Y-%m-%d %H:%M}"
    return UserError(
        f"{budget.flag}: the budget is used up ({usage.used_sec / 3600:.2f} hours of running time{over})",
        f"give a larger budget, or see the results: launch.py report {request.out}",
    )


def _make(request: BudgetRequest, budget: Budget, usage: UsageMeter) -> ActivePlan:
    """Measure, plan, and write the plan."""
    measured, start_sec = _measure(request, budget.until(usage))
    plan = _plan(request, measured, start_sec)
    since_sec = measured["left_sec"] - (budget.until(usage) - time.monotonic())
    used_sec = usage.used_sec - since_sec  # at the time of the measurement
    text = describe(plan, measured, budget=budget.flag, used_sec=used_sec, price=request.config.price)
    say(text)
    _write(request, budget, plan, start_sec, text)
    return ActivePlan(plan, budget, usage, measured)


def _resume(request: BudgetRequest, budget: Budget, usage: UsageMeter, saved: dict[str, Any]) -> ActivePlan:
    """The plan of an earlier start; its budget may be another one now."""
    measured = _read(request.out / CALIBRATION, "left_sec", "views_per_sec")
    plan = _plan(request, measured, saved["start_sec"])
    say(saved["text"])
    left_sec = budget.until(usage) - time.monotonic()
    say(
        f"{budget.flag}: {duration(usage.used_sec)} used, {duration(left_sec)} left; "
        f"the plan above is from the first start ({request.out / PLAN})"
    )
    if not request.config.plan_only:
        _write(request, budget, plan, saved["start_sec"], saved["text"])
    return ActivePlan(plan, budget, usage, measured)


def _plan(request: BudgetRequest, measured: dict[str, Any], start_sec: float) -> Plan:
    return make_plan(
        request.rows,
        request.recipes(),
        measured,
        start_sec=start_sec,
        judged=request.judged,
        may_drop=request.may_drop,
        keep_eval_every="eval_every" in request.flags,
    )


def _write(request: BudgetRequest, budget: Budget, plan: Plan, start_sec: float, text: str) -> None:
    content = {
        "flags": request.flags,
        "begun": not request.config.plan_only,
        "budget": {
            "asked": budget.flag,
            "hours": budget.hours,
            "moment": budget.moment and budget.moment.isoformat(),
            "gpus": budget.gpus,
        },
        "start_sec": start_sec,
        "rows": plan.to_json(),
        "left_out": plan.left_out,
        "text": text,
    }
    write_json(request.out / PLAN, content)


def _measure(request: BudgetRequest, until: float) -> tuple[dict[str, Any], float]:
    """Run the calibration: its findings, and the seconds to start and end a task."""
    say("measuring training and evaluation speed (seconds per row, longer on a busy machine)")
    recipes = request.recipes()
    stretched = [recipe for recipe in recipes if recipe["recipe"] != REFERENCE] or recipes
    trainings = [row.configure(stretched[0]) for row in request.rows]
    sides = {side for recipe in recipes for _, side in side_starts(request.rows[0].configure(recipe))}
    file = request.out / CALIBRATION
    config = CalibrateConfig(
        trainings=tuple(to_json(training) for training in trainings),
        sides=tuple(sorted(sides)),
        json=str(file),
        **{name: getattr(request.config, name) for name in LaunchOptions.__dataclass_fields__},
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
