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
from typing import Any

from fast_spatial.config.commands import DEFAULT_IMAGES, EvaluateConfig
from fast_spatial.config.fields import identity, to_json
from fast_spatial.config.modes import DIGITS, MODES, PUBLISHED
from fast_spatial.config.recipes import FAST, PUBLISHED_CONDITIONS, PUBLISHED_LADDER, REFERENCE, recipe_as_typed
from fast_spatial.config.rows import RowRequest
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.kernels.spatial import GRID_VIEWS
from fast_spatial.runtime.text import aligned
from fast_spatial.training.schedule import mean_over_rest, side_starts

# At least this number of rows is kept, whatever the budget: the paper's comparison.
_FEWEST_ROWS = 3
# Largest shares for judging: the grid and the landscape of the budget, validation of the training steps.
_GRID_SHARE, _LANDSCAPE_SHARE, _VALIDATION_SHARE = 0.25, 0.1, 0.05
# Recipes with milestones cannot be shortened. One is chosen if it fits into this share of the training time: the first
# if it is requested by name, the second otherwise.
_MILESTONES_SHARE, _REFERENCE_SHARE = 0.95, 0.85
# Average number of judged grid views of a broken image, from evaluations of this project.
_VIEWS_OF_BROKEN_IMAGE = 30
_EVALUATED_VIEWS = EvaluateConfig.views
# Expected grid accuracy on the digits, as a share. It is above the results of 8 epochs in
# `benchmarks/results/digits.json`, since a budget may allow more epochs.
_DIGITS_SURVIVORS = {"nocrop": 0.0, "standard": 0.0, "random": 0.6, "worst10": 0.85}
# Time for a training's last checkpoint and process exit, if no evaluation follows.
_FINISH_SEC = 3.0
# Time to write the tables and the report, fixed and per row; time for process exit on a busy machine; and a reserve, as
# a share of the budget.
_REPORT_SEC, _REPORT_ROW_SEC, _END_SEC, _END_SHARE = 3.0, 0.5, 2.0, 0.005


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
        start_sec: seconds to start and end a task.

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

    @property
    def is_fixed(self) -> bool:
        """Whether the schedule cannot be stretched or cut."""
        return self.train.schedule == "milestones"

    @property
    def landscape_task_sec(self) -> float:
        """Seconds of the landscape, with start and end of its task."""
        return self.landscape_sec + self.start_sec if self.landscape_per_class else 0.0

    @property
    def after_sec(self) -> float:
        """Seconds after the last step of the training."""
        last = self.evaluation_sec + self.start_sec if self.evaluation_sec else _FINISH_SEC
        return self.validation_sec + last + self.landscape_task_sec

    @property
    def fixed_sec(self) -> float:
        """Seconds of the row without its epochs."""
        return self.start_sec + self.after_sec


@dataclass(frozen=True)
class Plan:
    """The rows, what is left out and why, and the seconds to finish after the last row."""

    rows: list[PlannedRow]
    left_out: list[str]
    end_sec: float

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as JSON values."""
        return [{**dataclasses.asdict(row), "train": to_json(row.train)} for row in self.rows]


def candidate_recipes(asked: str, data: str, rows: Sequence[RowRequest]) -> list[Recipe]:
    """The recipes that a budget may choose from: the requested one, or all that fit the other flags.

    Raises:
        UserError: if none fits.

    """
    if asked:
        return [{"recipe": asked}]
    # `fast` has 2 warm-up epochs, so recipes with more epochs have a smaller share of warm-up.
    ladder: list[Recipe] = [{"recipe": FAST, "epochs": str(epochs)} for epochs in PUBLISHED_LADDER]
    known: list[Recipe] = [{"recipe": "digits_linear"}] if data == DIGITS else [{"recipe": REFERENCE}, *ladder]
    fitting = []
    for recipe in known:
        try:
            for row in rows:
                row.configure(recipe)
        except UserError:
            if recipe == known[-1]:
                raise
            continue
        fitting.append(recipe)
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

    Raises:
        UserError: if the budget is too small for one epoch, or for the requested recipe.

    """
    kept = list(requests)
    left_out: list[str] = []
    while True:
        rows, epochs, notes = _attempt(
            kept, requests, recipes, measured, start_sec=start_sec, judged=judged, keep_eval_every=keep_eval_every
        )
        enough = rows[0].is_fixed or epochs >= min(row.train.epochs for row in rows)
        if enough or not may_drop or len(kept) <= _FEWEST_ROWS:
            break
        dropped = min(kept, key=lambda request: request.importance)
        kept.remove(dropped)
        left_out.append(
            f"row {dropped.name}: with it, each row would get only {max(0.0, epochs):.1f} epochs, and "
            f"the shortest recipe has {min(row.train.epochs for row in rows)}"
        )
    if epochs < 1:
        compiled = rows[0].train.is_compiled(on_gpu=measured["gpus"] > 0)
        compiling = "; or add --compile false, which saves the time of compilation" if compiled else ""
        needed = sum(row.fixed_sec + row.epoch_sec for row in rows) + _end_sec(len(rows), measured["left_sec"], judged)
        fewer = f"{'fewer --rows, ' if judged else ''}or fewer images (--max-classes, --max-train-images)"
        raise UserError(
            f"the budget is too small: {max(0.0, measured['left_sec']):.0f} s are left after measuring, and one epoch "
            f"of {', '.join(row.name for row in rows)} with evaluation takes {needed:.0f} s",
            f"give at least {math.ceil(needed - measured['left_sec'])} s more, {fewer}{compiling}; stop other programs "
            f"that keep this machine busy",
        )
    return Plan(rows, left_out + notes, _end_sec(len(rows), measured["left_sec"], judged))


def _attempt(
    kept: Sequence[RowRequest],
    requests: Sequence[RowRequest],
    recipes: Sequence[Recipe],
    measured: dict[str, Any],
    *,
    start_sec: float,
    judged: bool,
    keep_eval_every: bool,
) -> tuple[list[PlannedRow], float, list[str]]:
    """The rows under the best fitting recipe, their epochs, and notes on images that are not judged."""
    left = measured["left_sec"]
    rates = {request.name: training for request, training in zip(requests, measured["trainings"])}
    judging = _Judging([request.configure(recipes[-1]) for request in kept], measured, judged)

    def rows_under(recipe: Recipe) -> tuple[list[PlannedRow], float]:
        rows = [
            judging.row(request, request.configure(recipe), rates[request.name], start_sec, keep_eval_every)
            for request in kept
        ]
        time = left - _end_sec(len(rows), measured["left_sec"], judged) - sum(row.fixed_sec for row in rows)
        return rows, time / sum(row.epoch_sec for row in rows)

    def with_epochs(rows: list[PlannedRow], epochs: float) -> list[PlannedRow]:
        return [dataclasses.replace(row, epochs=epochs) for row in rows]

    ladder = []
    for recipe in recipes:
        rows, epochs = rows_under(recipe)
        if not rows[0].is_fixed:
            ladder.append((recipe, rows, epochs))
            continue
        needed = rows[0].train.epochs
        if epochs * (_MILESTONES_SHARE if len(recipes) == 1 else _REFERENCE_SHARE) >= needed:
            return with_epochs(rows, needed), needed, judging.left_out
        if len(recipes) == 1:
            seconds = sum(row.fixed_sec + needed * row.epoch_sec for row in rows)
            raise UserError(
                f"--recipe {rows[0].train.recipe}: too long for the budget: {needed} epochs take {seconds / 3600:.2f} "
                f"hours for {', '.join(row.name for row in rows)}, {left / 3600:.2f} are left, and milestones are "
                f"never rescaled",
                "raise the budget, or choose a recipe with a linear schedule",
            )
    fitting = [(rows, epochs) for _, rows, epochs in ladder if rows[0].train.epochs <= epochs]
    rows, epochs = fitting[-1] if fitting else ladder[0][1:]
    return with_epochs(rows, epochs), epochs, judging.left_out


class _Judging:
    """The number of images for the grid and the landscape, the same in all rows."""

    def __init__(self, trainings: Sequence[TrainConfig], measured: dict[str, Any], judged: bool) -> None:
        self._measured, self._judged, self.left_out = measured, judged, list[str]()
        self.grid_per_class, self.landscape_per_class = 0, 0
        if not judged:
            return
        left, rate, classes = measured["left_sec"], measured["views_per_sec"], measured["classes"]
        fewest = measured["val_images_of_a_class"]
        of_class = measured["val_images"] / classes
        full = sum(_flips(config) * self._grid_sec(expected_survivors(config), of_class) for config in trainings)
        if full > _GRID_SHARE * left:
            self.grid_per_class = min(int(of_class * _GRID_SHARE * left / full), fewest) or -1
            few = f"{self.grid_per_class} images of every class" if self.grid_per_class > 0 else "none"
            self.left_out.append(
                f"the grid of {GRID_VIEWS} views for all {measured['val_images']:,} images, about "
                f"{100 * full / left:.0f} % of the budget: reduced to {few}"
            )
        wanted = min(fewest, max(1, DEFAULT_IMAGES // classes))
        of_round = len(trainings) * GRID_VIEWS * classes / rate
        self.landscape_per_class = min(wanted, int(_LANDSCAPE_SHARE * left / of_round))
        if self.landscape_per_class < wanted:
            fewer = self.landscape_per_class
            self.left_out.append(
                f"landscapes of {wanted} images of every class, about "
                f"{100 * wanted * of_round / left:.0f} % of the budget: reduced to "
                + (f"{fewer} of every class" if fewer else "none")
            )

    def _grid_sec(self, survivors: float, per_class: float) -> float:
        views = survivors * GRID_VIEWS + (1 - survivors) * _VIEWS_OF_BROKEN_IMAGE
        return float(per_class * self._measured["classes"] * views / self._measured["views_per_sec"])

    def row(
        self,
        request: RowRequest,
        config: TrainConfig,
        rates: dict[str, Any],
        start_sec: float,
        keep_eval_every: bool,
    ) -> PlannedRow:
        """A row under a recipe, with its epochs not yet set."""
        measured = self._measured
        steps = measured["images"] // config.global_batch_size
        step_sec = {
            side: config.global_batch_size / rates["images_per_sec"][str(side)] for _, side in side_starts(config)
        }
        steps_sec = steps * mean_over_rest(config, 0.0, step_sec)
        validation_sec = measured["val_images"] / rates["validation_images_per_sec"]
        every = config.eval_every
        if every and not keep_eval_every:
            every = max(every, math.ceil(validation_sec / (_VALIDATION_SHARE * steps_sec)))
            config = dataclasses.replace(config, eval_every=every)
        evaluation_sec = landscape_sec = 0.0
        if self._judged:
            natural = measured["val_images"] * (_EVALUATED_VIEWS + 1) / measured["views_per_sec"]
            of_class = self.grid_per_class or measured["val_images"] / measured["classes"]
            grid = self._grid_sec(expected_survivors(config), of_class) if self.grid_per_class >= 0 else 0.0
            evaluation_sec = _flips(config) * (natural + grid)
            landscape_sec = self.landscape_per_class * GRID_VIEWS * measured["classes"] / measured["views_per_sec"]
        return PlannedRow(
            name=request.name,
            train=config,
            epochs=0.0,
            step_sec=step_sec,
            epoch_sec=steps_sec + (validation_sec / every if every else 0.0),
            validation_sec=validation_sec,
            evaluation_sec=evaluation_sec,
            grid_per_class=self.grid_per_class,
            landscape_sec=landscape_sec,
            landscape_per_class=self.landscape_per_class,
            start_sec=start_sec,
        )


def expected_survivors(config: TrainConfig) -> float:
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


def _end_sec(rows: int, left_sec: float, judged: bool) -> float:
    return _END_SEC + _END_SHARE * left_sec + (_REPORT_SEC + rows * _REPORT_ROW_SEC if judged else 0.0)


def describe(plan: Plan, measured: dict[str, Any], *, asked: str, used_sec: float, price: float) -> str:
    """The plan as text: rows, what is left out, the expected finish and the expected accuracy."""
    gpus, left_sec = measured["gpus"], measured["left_sec"]
    where = f"{gpus} GPUs" if gpus > 1 else "one GPU" if gpus else "this machine's CPUs"
    total = used_sec + left_sec
    cost = f", {gpus * total / 3600 * price:.2f} at {price:g} a GPU-hour" if price and gpus else ""
    judged = any(row.evaluation_sec for row in plan.rows)
    heads = ["row", "recipe", "epochs", "size", "views", "images/s", "training", "evaluation", "landscape"]
    lines = [heads if judged else heads[:-2]]
    for row in plan.rows:
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
    needed = plan.end_sec + sum(row.fixed_sec + row.epochs * row.epoch_sec for row in plan.rows)
    finish = datetime.datetime.now() + datetime.timedelta(seconds=needed)
    text = [
        f"budget: {asked}: {duration(total)} on {where}{cost}; {duration(used_sec)} used",
        aligned(lines),
        f"expected finish: {finish:%Y-%m-%d %H:%M:%S}, in {duration(needed)}",
    ]
    if needed < 0.95 * left_sec:
        text.append(f"{duration(left_sec - needed)} stay unused: the recipe's milestones are never rescaled")
    text += [f"left out: {reason}" for reason in plan.left_out]
    return "\n".join([*text, *expectation(plan, measured)])


def duration(seconds: float) -> str:
    """Seconds as text in a suitable unit: s, min, h or days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.0f} days"


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
