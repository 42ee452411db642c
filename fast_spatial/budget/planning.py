"""From a budget and measured speeds to a plan: rows, recipe, epochs, and images to judge.

All rows get the same number of epochs, so that they stay comparable. Trainings share the time that remains after all
evaluations; evaluations have a limit of their own. This module measures nothing and runs no task.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fast_spatial.config.budget_policy import DEFAULT_POLICY, BudgetPolicy
from fast_spatial.config.commands import DEFAULT_IMAGES, EvaluateConfig
from fast_spatial.config.fields import identity, to_json
from fast_spatial.config.modes import DIGITS, MODES, PUBLISHED
from fast_spatial.config.recipes import FAST, PUBLISHED_CONDITIONS, PUBLISHED_LADDER, REFERENCE, recipe_as_typed
from fast_spatial.config.rows import RowRequest
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import GRID_VIEWS
from fast_spatial.runtime.run_files import RESULT
from fast_spatial.runtime.text import aligned, duration
from fast_spatial.training.schedule import mean_over_rest, side_starts

_EVALUATED_VIEWS = EvaluateConfig.views
# Expected grid accuracy on the digits, as a share. It is above the results of 8 epochs in
# `benchmarks/results/digits.json`, since a budget may allow more epochs.
_DIGITS_SURVIVORS = {"nocrop": 0.0, "standard": 0.0, "random": 0.6, "worst10": 0.85}
# A recipe as raw flags: its name, and optionally its epochs.
Recipe = dict[str, str]


@dataclass(frozen=True)
class PlannedRow:
    """A row of the plan, and the expected time of each part.

    Attributes:
        name: the row's name.
        train: the training, with the recipe's own epochs; the budget stretches or cuts them.
        epochs: epochs that fit the budget.
        step_sec: seconds per step, by image size.
        epoch_sec: seconds per epoch, averaged over the training, validation included.
        validation_sec: seconds per validation.
        evaluation_sec: seconds of the evaluation under all attacks; 0: none.
        grid_per_class: images of every class that meet the grid; 0: all; -1: none.
        landscape_sec: seconds of the landscape; 0: none.
        landscape_per_class: images of every class in the landscape.
        start_sec: seconds to start and end the training, its cold first passes included.
        judging_start_sec: the same, of the evaluation and of the landscape.
        finish_sec: seconds after the last step, if no evaluation follows.

    """

    name: str
    train: TrainConfig
    epochs: float
    step_sec: dict[int, float]
    epoch_sec: float
    validation_sec: float
    evaluation_sec: float
    grid_per_class: int
    landscape_sec: float
    landscape_per_class: int
    start_sec: float
    judging_start_sec: float
    finish_sec: float

    @property
    def is_finished(self) -> bool:
        """Whether the row has its result."""
        return (Path(self.train.out) / RESULT).is_file()

    @property
    def is_fixed(self) -> bool:
        """Whether the schedule cannot be stretched or cut."""
        return self.train.schedule == "milestones"

    @property
    def landscape_task_sec(self) -> float:
        """Seconds of the landscape, with start and end of its task."""
        return self.landscape_sec + self.judging_start_sec if self.landscape_per_class else 0.0

    @property
    def after_sec(self) -> float:
        """Seconds after the last step of the training."""
        last = self.evaluation_sec + self.judging_start_sec if self.evaluation_sec else self.finish_sec
        return self.validation_sec + last + self.landscape_task_sec

    @property
    def fixed_sec(self) -> float:
        """Seconds of the row without its epochs."""
        return self.start_sec + self.after_sec

    @property
    def total_sec(self) -> float:
        """Seconds of the row."""
        return self.fixed_sec + self.epochs * self.epoch_sec


@dataclass(frozen=True)
class Plan:
    """The rows, what is left out and why, and the seconds to finish after the last row."""

    rows: list[PlannedRow]
    left_out: list[str]
    end_sec: float

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as JSON values."""
        return [{**dataclasses.asdict(row), "train": to_json(row.train)} for row in self.rows]


def candidate_recipes(recipe: str, data: str, rows: Sequence[RowRequest]) -> list[Recipe]:
    """The recipes that a budget may choose from: the requested one, or all that fit the other flags.

    Raises:
        UserError: if none fits.

    """
    # `fast` has 2 warm-up epochs, so recipes with more epochs have a smaller share of warm-up.
    ladder: list[Recipe] = [{"recipe": FAST, "epochs": str(epochs)} for epochs in PUBLISHED_LADDER]
    known: list[Recipe] = [{"recipe": "digits_linear"}] if data == DIGITS else [{"recipe": REFERENCE}, *ladder]
    fitting = []
    for candidate in [{"recipe": recipe}] if recipe else known:
        try:
            for row in rows:
                row.configure(candidate)
        except UserError:
            if recipe or candidate == known[-1]:
                raise
            continue
        fitting.append(candidate)
    return fitting


def make_plan(
    requests: Sequence[RowRequest],
    recipes: Sequence[Recipe],
    measured: dict[str, Any],
    *,
    start_sec: float,
    judged: bool,
    may_drop: bool,
    keep_eval_every: bool,
    policy: BudgetPolicy = DEFAULT_POLICY,
) -> Plan:
    """The plan for these rows.

    Args:
        requests: the requested rows, in order of execution.
        recipes: the recipes to choose from.
        measured: the output of `calibration.calibrate`, with one training per request.
        start_sec: seconds to start and end a task.
        judged: whether rows are evaluated under all attacks, mapped and reported, or only trained.
        may_drop: whether rows may be dropped.
        keep_eval_every: whether the recipe's interval of validations is kept, whatever its cost.
        policy: constants of the plan.

    Raises:
        UserError: if the budget is too small for one epoch, or for the requested recipe.

    """
    planner = _Planner(measured, start_sec, judged, keep_eval_every, policy)
    kept, left_out = list(zip(requests, measured["trainings"])), list[str]()
    while True:
        plan, epochs = planner.longest(kept, recipes)
        shortest = min(row.train.epochs for row in plan.rows)
        enough = plan.rows[0].is_fixed or epochs >= shortest
        if enough or not may_drop or len(kept) <= policy.fewest_rows:
            break
        dropped = min(kept, key=lambda row: row[0].importance)
        kept.remove(dropped)
        left_out.append(
            f"row {dropped[0].name}: with it, each row would get only {max(0.0, epochs):.1f} epochs, and "
            f"the shortest recipe has {shortest}"
        )
    if epochs < 1:
        raise _too_small(plan, measured, judged=judged)
    return dataclasses.replace(plan, left_out=left_out + plan.left_out)


def _too_small(plan: Plan, measured: dict[str, Any], *, judged: bool) -> UserError:
    left_sec = measured["left_sec"]
    compiled = plan.rows[0].train.is_compiled(on_gpu=measured["gpus"] > 0)
    compiling = "; or add --compile false, which saves the time of compilation" if compiled else ""
    needed = plan.end_sec + sum(row.fixed_sec + row.epoch_sec for row in plan.rows)
    fewer = f"{'fewer --rows, ' if judged else ''}or fewer images (--max-classes, --max-train-images)"
    return UserError(
        f"the budget is too small: {duration(max(0.0, left_sec))} are left after measuring, and one epoch "
        f"of {', '.join(row.name for row in plan.rows)} with evaluation takes {duration(needed)}",
        f"give at least {math.ceil(needed - left_sec)} s more, {fewer}{compiling}; stop other programs "
        f"that keep this machine busy",
    )


# A requested row, and the measured rates of its training.
_RatedRow = tuple[RowRequest, dict[str, Any]]


@dataclass(frozen=True)
class _Planner:
    """Plans for given rows: see `make_plan` for the attributes."""

    measured: dict[str, Any]
    start_sec: float
    judged: bool
    keep_eval_every: bool
    policy: BudgetPolicy

    def longest(self, kept: Sequence[_RatedRow], recipes: Sequence[Recipe]) -> tuple[Plan, float]:
        """The plan with the longest recipe that fits, else with the shortest; and the epochs that fit."""
        judging = self._judging([request.configure(recipes[-1]) for request, _ in kept])
        stretched = []
        for recipe in recipes:
            rows = [self._row(request, rates, recipe, judging) for request, rates in kept]
            epochs = (self.measured["left_sec"] - self._end_sec(len(rows)) - sum(row.fixed_sec for row in rows)) / sum(
                row.epoch_sec for row in rows
            )
            if not rows[0].is_fixed:
                stretched.append((rows, epochs))
                continue
            needed, is_only = rows[0].train.epochs, len(recipes) == 1
            if epochs * (self.policy.milestones_share if is_only else self.policy.reference_share) >= needed:
                return self._plan(rows, needed, judging), needed
            if is_only:
                raise _too_long(rows, self.measured["left_sec"])
        fitting = [(rows, epochs) for rows, epochs in stretched if rows[0].train.epochs <= epochs]
        rows, epochs = fitting[-1] if fitting else stretched[0]
        return self._plan(rows, epochs, judging), epochs

    def _plan(self, rows: Sequence[PlannedRow], epochs: float, judging: _Judging) -> Plan:
        planned = [dataclasses.replace(row, epochs=epochs) for row in rows]
        return Plan(planned, judging.left_out, self._end_sec(len(rows)))

    def _end_sec(self, rows: int) -> float:
        policy = self.policy
        report_sec = policy.report_sec + rows * policy.report_row_sec if self.judged else 0.0
        return float(policy.end_sec + policy.end_share * max(0.0, self.measured["left_sec"]) + report_sec)

    def _judging(self, trainings: Sequence[TrainConfig]) -> _Judging:
        """The number of images for the grid and the landscape, the same in all rows."""
        if not self.judged:
            return _Judging(0, 0, [])
        left_sec, classes, fewest = (self.measured[key] for key in ("left_sec", "classes", "val_images_of_a_class"))
        of_class = self.measured["val_images"] / classes
        left_out = []
        grid_per_class, grid_share = 0, self.policy.grid_share
        full_sec = sum(self._grid_sec(config, of_class) for config in trainings)
        if full_sec > grid_share * left_sec:
            grid_per_class = min(max(0, int(of_class * grid_share * left_sec / full_sec)), fewest) or -1
            few = f"{grid_per_class} images of every class" if grid_per_class > 0 else "none"
            left_out.append(
                f"the grid of {GRID_VIEWS} views for all {self.measured['val_images']:,} images, about "
                f"{100 * full_sec / left_sec:.0f} % of the budget: reduced to {few}"
            )
        wanted = min(fewest, max(1, DEFAULT_IMAGES // classes))
        round_sec = len(trainings) * self._landscape_sec(1)
        landscape_per_class = min(wanted, max(0, int(self.policy.landscape_share * left_sec / round_sec)))
        if landscape_per_class < wanted:
            left_out.append(
                f"landscapes of {wanted} images of every class, about "
                f"{100 * wanted * round_sec / left_sec:.0f} % of the budget: reduced to "
                + (f"{landscape_per_class} of every class" if landscape_per_class else "none")
            )
        return _Judging(grid_per_class, landscape_per_class, left_out)

    def _grid_sec(self, config: TrainConfig, per_class: float) -> float:
        """Seconds of the grid on this number of images of every class."""
        survivors = _expected_survivors(config)
        views = survivors * GRID_VIEWS + (1 - survivors) * self.policy.views_of_broken_image
        images = per_class * self.measured["classes"]
        return float(_flips(config) * images * views / self.measured["views_per_sec"])

    def _landscape_sec(self, per_class: int) -> float:
        return float(per_class * self.measured["classes"] * GRID_VIEWS / self.measured["views_per_sec"])

    def _row(self, request: RowRequest, rates: dict[str, Any], recipe: Recipe, judging: _Judging) -> PlannedRow:
        """A row under a recipe, with its epochs not yet set."""
        measured, config = self.measured, request.configure(recipe)
        batch = config.global_batch_size
        step_sec = {side: batch / rates["images_per_sec"][str(side)] for _, side in side_starts(config)}
        steps = measured["images"] // batch
        steps_sec = steps * mean_over_rest(config, 0.0, step_sec)
        validation_sec = measured["val_images"] / rates["validation_images_per_sec"]
        every = config.eval_every
        if every and not self.keep_eval_every:
            every = max(every, math.ceil(validation_sec / (self.policy.validation_share * steps_sec)))
            config = dataclasses.replace(config, eval_every=every)
        return PlannedRow(
            name=request.name,
            train=config,
            epochs=0.0,
            step_sec=step_sec,
            epoch_sec=steps_sec + (validation_sec / every if every else 0.0),
            validation_sec=validation_sec,
            evaluation_sec=self._evaluation_sec(config, judging.grid_per_class) if self.judged else 0.0,
            grid_per_class=judging.grid_per_class,
            landscape_sec=self._landscape_sec(judging.landscape_per_class),
            landscape_per_class=judging.landscape_per_class,
            # Missing in calibrations of earlier versions.
            start_sec=self.start_sec + measured.get("training_cold_sec", 0.0),
            judging_start_sec=self.start_sec + measured.get("judging_cold_sec", 0.0),
            finish_sec=self.policy.finish_sec,
        )

    def _evaluation_sec(self, config: TrainConfig, grid_per_class: int) -> float:
        images = self.measured["val_images"]
        natural_sec = _flips(config) * images * (_EVALUATED_VIEWS + 1) / self.measured["views_per_sec"]
        if grid_per_class < 0:
            return float(natural_sec)
        return float(natural_sec + self._grid_sec(config, grid_per_class or images / self.measured["classes"]))


@dataclass(frozen=True)
class _Judging:
    """Images of every class for the grid (0: all; -1: none) and the landscape, and notes on what is left out."""

    grid_per_class: int
    landscape_per_class: int
    left_out: list[str]


def _too_long(rows: Sequence[PlannedRow], left_sec: float) -> UserError:
    epochs = rows[0].train.epochs
    seconds = sum(row.fixed_sec + epochs * row.epoch_sec for row in rows)
    return UserError(
        f"--recipe {rows[0].train.recipe}: too long for the budget: {epochs} epochs take {seconds / 3600:.2f} "
        f"hours for {', '.join(row.name for row in rows)}, {left_sec / 3600:.2f} are left, and milestones are "
        f"never rescaled",
        "raise the budget, or choose a recipe with a linear schedule",
    )


def _expected_survivors(config: TrainConfig) -> float:
    """The expected grid accuracy, as a share; decides the time reserved for the grid."""
    if config.data == DIGITS:
        return _DIGITS_SURVIVORS[config.mode]
    degrees = config.degrees if MODES[config.mode].warps != 0 else 0.0
    known = PUBLISHED.get((config.mode, degrees)) or next(
        v for (mode, _), v in PUBLISHED.items() if mode == config.mode
    )
    return known[3] / 100


def _flips(config: TrainConfig) -> int:
    """Forward passes per view: 2 with flip averaging."""
    return 2 if config.eval_flip else 1


def describe(
    plan: Plan,
    measured: dict[str, Any],
    *,
    budget: str,
    used_sec: float,
    price: float,
    policy: BudgetPolicy = DEFAULT_POLICY,
) -> str:
    """The plan as text: rows, what is left out, the expected finish and the expected accuracy."""
    gpus, left_sec = measured["gpus"], measured["left_sec"]
    where = f"{gpus} GPUs" if gpus > 1 else "one GPU" if gpus else "this machine's CPUs"
    total_sec = used_sec + left_sec
    cost = f", {gpus * total_sec / 3600 * price:.2f} at {price:g} a GPU-hour" if price and gpus else ""
    needed_sec = plan.end_sec + sum(row.total_sec for row in plan.rows)
    finish = datetime.datetime.now() + datetime.timedelta(seconds=needed_sec)
    text = [
        f"budget: {budget}: {duration(total_sec)} on {where}{cost}; {duration(used_sec)} used",
        _table(plan.rows),
        f"expected finish: {finish:%Y-%m-%d %H:%M:%S}, in {duration(needed_sec)}",
    ]
    if left_sec - needed_sec > policy.unused_share * left_sec:
        text.append(f"{duration(left_sec - needed_sec)} stay unused: the recipe's milestones are never rescaled")
    text += [f"left out: {reason}" for reason in plan.left_out]
    return "\n".join([*text, *expectation(plan, measured)])


def _table(rows: Sequence[PlannedRow]) -> str:
    judged = any(row.evaluation_sec for row in rows)
    heads = ["row", "recipe", "epochs", "size", "views", "images/s", "training", "evaluation", "landscape"]
    lines = [heads if judged else heads[:-2]]
    for row in rows:
        sides = [side for _, side in side_starts(row.train)]
        rates = [f"{row.train.global_batch_size / row.step_sec[side]:,.0f}" for side in sides]
        cells = [
            row.name,
            recipe_as_typed(row.train.recipe, row.train.epochs),
            f"{row.epochs:.1f}",
            "-".join(map(str, sides)),
            str(row.train.num_views),
            "-".join(rates),
            duration(row.start_sec + row.epochs * row.epoch_sec + row.validation_sec),
        ]
        if judged:
            cells += [duration(row.evaluation_sec), duration(row.landscape_sec) if row.landscape_per_class else "-"]
        lines.append(cells)
    return aligned(lines)


def expectation(plan: Plan, measured: dict[str, Any]) -> list[str]:
    """Published accuracies for this number of epochs, as upper bounds."""
    train, epochs = plan.rows[0].train, plan.rows[0].epochs
    if (measured["classes"], measured["images"] // 10_000) != (1000, 128) or train.arch != "resnet18":
        return ["expected accuracy: no published results for these images and this network"]
    if train.recipe == REFERENCE:
        as_published = identity(TrainConfig(data="-", out="-", mode=train.mode))
        changed = [name for name, value in as_published.items() if identity(train)[name] != value]
        if set(changed) <= {"degrees", "translate_px", "seed"}:
            return ["expected accuracy: the published table's"]
        return [f"expected accuracy: the published table's, except for changed options ({', '.join(changed)})"]
    below = [run.top1_pct for known, run in PUBLISHED_LADDER.items() if known <= epochs]
    above = [run.top1_pct for known, run in PUBLISHED_LADDER.items() if known >= epochs]
    if not below:
        found = f"below {above[0]:.1f} %, the result of 16 epochs"
    elif not above:
        found = f"at most about {below[-1]:.1f} %, the result of {max(PUBLISHED_LADDER)} epochs"
    else:
        found = f"at most {below[-1]:.1f} to {above[0]:.1f} %"
    return [
        f"expected natural accuracy of standard training, an upper bound: {found}",
        f"  published for {PUBLISHED_CONDITIONS};",
        "  without BlurPool, and judged at 224 px without flips, expect less; the other rows' published natural "
        "accuracy is 2 to 6 points below standard's",
    ]
