"""The constants of budgets: docs/budgets.md lists all of them, and they act in the direction that it says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fast_spatial.budget.active_plan import ActivePlan
from fast_spatial.budget.planning import PlannedRow
from fast_spatial.budget.usage import Budget, UsageMeter
from fast_spatial.config.budget_policy import BudgetPolicy
from fast_spatial.training.pacing import NewEnd, Pacer, TrainingDeadline
from fast_spatial.training.schedule import Timeline
from tests.budget.test_planning import DIGITS, planned
from tests.training.test_pacing import config_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "budgets.md"
DEFAULTS = dataclasses.asdict(BudgetPolicy())


def test_the_document_lists_every_constant_with_its_default():
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` *\|(.+)\|$", text, re.MULTILINE)
    cells = {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}
    assert {name: found[0] for name, found in cells.items()} == {n: f"{value:g}" for n, value in DEFAULTS.items()}
    assert all(len(found) == 4 and all(found) for found in cells.values())


def test_every_constant_has_a_line_of_its_own():
    described = re.findall(r"^        (\w+): \S.*[.]$", BudgetPolicy.__doc__ or "", re.MULTILINE)
    assert described == list(DEFAULTS)


def short_row(policy: BudgetPolicy) -> PlannedRow:
    """A row whose judging has to be reduced."""
    return planned("digits", 0.04, rows="worst10:30", policy=policy).rows[0]


def end_sec(policy: BudgetPolicy) -> float:
    return planned("digits", 0.25, policy=policy).end_sec


def active(policy: BudgetPolicy) -> ActivePlan:
    plan = planned("digits", 0.25, rows="standard;worst10:30")
    usage = UsageMeter(Path("nowhere"), 0.0, policy=policy)
    return ActivePlan(plan, Budget("", 1e9, None, 0), usage, {**DIGITS, "val_images_of_a_class": 1000}, policy)


def of_row(policy: BudgetPolicy, number: int, limit: Callable[[ActivePlan, PlannedRow], float]) -> float:
    opened = active(policy)
    return limit(opened, opened.plan.rows[number])


def first_decision(policy: BudgetPolicy, *, start_size: int = 0, after_sec: float = 0.0) -> tuple[int, NewEnd]:
    """The first decision of a training of 100 s whose steps take three times as long as expected, and its step."""
    now, step_sec = 0.0, {16: 0.1, 32: 0.1}
    config = config_of(start_size=str(start_size))
    pacer = Pacer(
        TrainingDeadline(100.0 + after_sec, after_sec, step_sec, evaluation_sec=0.0, interval_sec=1.0),
        config,
        Timeline.of_steps(1000),
        steps_per_epoch=23,
        clock=lambda: now,
        policy=policy,
    )
    for done in range(1, 1000):
        now += 0.3
        if (found := pacer.after_step(done, start_size or 32)).end:
            return done, found
    raise AssertionError("nothing was decided")


def planned_end(policy: BudgetPolicy) -> int:
    """The first decision's planned end; the end of all steps if the training is only stopped."""
    found = first_decision(policy)[1]
    return found.end if found.start < found.end else 1000


def lead(policy: BudgetPolicy, start_size: int = 0) -> int:
    done, found = first_decision(policy, start_size=start_size)
    return found.start - done


# Constants, and a number that they raise (1) or lower (-1).
EFFECTS: dict[str, tuple[int, Callable[[BudgetPolicy], float]]] = {
    "grid_share": (1, lambda policy: short_row(policy).evaluation_sec),
    "landscape_share": (1, lambda policy: short_row(policy).landscape_per_class),
    "validation_share": (-1, lambda policy: planned("imagenet", 4.0, policy=policy).rows[0].train.eval_every),
    "views_of_broken_image": (1, lambda policy: planned("digits", 0.25, policy=policy).rows[0].evaluation_sec),
    "finish_sec": (1, lambda policy: planned("digits", 0.25, policy=policy).rows[0].finish_sec),
    "report_sec": (1, end_sec),
    "report_row_sec": (1, end_sec),
    "end_sec": (1, end_sec),
    "end_share": (1, end_sec),
    "judging_patience": (1, lambda policy: of_row(policy, 0, lambda a, row: round(a.evaluation_until(row.train), 0))),
    "last_landscape_factor": (1, lambda policy: of_row(policy, 1, lambda a, row: a.landscape(row.train)[0])),
    "interval_share": (1, lambda policy: of_row(policy, 1, lambda a, row: a.training_deadline(row.train).interval_sec)),
    "lead_steps": (1, lead),
    "lead_steps_of_sizes": (1, lambda policy: lead(policy, start_size=16)),
    "most_shortened": (1, lambda policy: planned_end(dataclasses.replace(policy, trust_recent=0))),
    "trust_recent": (1, lambda policy: planned_end(dataclasses.replace(policy, most_shortened=0))),
}


@pytest.mark.parametrize("name", EFFECTS)
def test_a_constant_acts_in_the_documented_direction(name):
    sign, effect = EFFECTS[name]
    kind = type(DEFAULTS[name])
    halved, default, doubled = (
        sign * effect(BudgetPolicy(**{name: kind(factor * DEFAULTS[name])})) for factor in (0.5, 1, 2)
    )
    assert halved <= default <= doubled
    assert halved < doubled


def test_a_policy_decides_how_many_rows_are_kept():
    rows = {fewest: len(planned("imagenet", 3.0, policy=BudgetPolicy(fewest_rows=fewest)).rows) for fewest in (1, 2, 5)}
    assert rows == {1: 1, 2: 2, 5: 5}
