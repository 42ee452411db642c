"""Plans worked out by hand, and the time that tasks get while a budget is spent."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_spatial.budget import active_plan
from fast_spatial.budget.planning import Plan, candidate_recipes, describe, expectation, make_plan
from fast_spatial.budget.usage import Budget, UsageMeter
from fast_spatial.config.budget_policy import DEFAULT_POLICY, BudgetPolicy
from fast_spatial.config.commands import ReproduceConfig
from fast_spatial.config.rows import requests
from fast_spatial.errors import UserError
from fast_spatial.runtime.text import duration

# What a machine was measured to do: every row a second for 10,000 images of one view, and of eleven views for 1,000.
IMAGENET = {
    "views_per_sec": 50_000.0,
    "images": 1_281_167,
    "val_images": 50_000,
    "val_images_of_a_class": 50,
    "classes": 1000,
}
DIGITS = {"views_per_sec": 3000.0, "images": 1497, "val_images": 300, "val_images_of_a_class": 22, "classes": 10}


def measured(about: dict[str, Any], rates: list[float], hours: float) -> dict[str, Any]:
    trainings = [
        {"images_per_sec": {"32": r, "160": 2 * r, "192": r, "224": r / 1.5}, "validation_images_per_sec": 2000.0}
        for r in rates
    ]
    return {"gpus": 0, **about, "trainings": trainings, "left_sec": 3600 * hours}


def planned(
    data: str,
    hours: float,
    *,
    rows: str = "",
    recipe: str = "",
    rates: tuple[float, ...] = (),
    policy: BudgetPolicy = DEFAULT_POLICY,
    **flags: str,
) -> Plan:
    config = ReproduceConfig(data=data, out="out", rows=tuple(filter(None, rows.split(";"))))
    requested = requests(config, flags)
    per_row = list(rates) or [400.0 if "worst10" in row.name else 4000.0 for row in requested]
    return make_plan(
        requested,
        candidate_recipes(recipe, data, requested),
        measured(DIGITS if data == "digits" else IMAGENET, per_row, hours),
        start_sec=10.0,
        judged=True,
        may_drop=not config.rows,
        keep_eval_every="eval_every" in flags,
        policy=policy,
    )


def total(plan: Plan) -> float:
    return plan.end_sec + sum(row.total_sec for row in plan.rows)


def test_all_rows_get_as_many_epochs_and_the_time_is_used():
    plan = planned("digits", 0.25)
    assert [row.name for row in plan.rows] == ["nocrop", "standard", "random, 30 degrees", "worst10, 30 degrees"]
    assert len({row.epochs for row in plan.rows}) == 1
    assert total(plan) == pytest.approx(900)
    # 23 steps of 64 images at 4000 a second, and at 400.
    assert [row.epoch_sec for row in plan.rows] == pytest.approx([0.368, 0.368, 0.368, 3.68])
    assert {row.train.recipe for row in plan.rows} == {"digits_linear"}


def test_the_sides_of_a_recipe_are_reckoned_with():
    row = planned("imagenet", 4.0, rows="standard").rows[0]
    steps = 1_281_167 // 1024
    assert row.step_sec == pytest.approx({160: 1024 / 8000, 192: 1024 / 4000})
    steps_sec = steps * (0.75 * 1024 / 8000 + 0.25 * 1024 / 4000)
    # An evaluation takes 25 s: after every third epoch it is below a twentieth of them.
    assert row.validation_sec == 25.0
    assert row.train.eval_every == 3
    assert 2 * 0.05 * steps_sec < 25 < 3 * 0.05 * steps_sec
    assert row.epoch_sec == pytest.approx(steps_sec + 25 / 3)


@pytest.mark.parametrize(
    ("hours", "recipe", "epochs"),
    [
        (1.1, "fast", 16),
        (1.55, "fast", 24),
        (2.0, "fast", 32),
        (3.0, "fast", 40),
        (3.9, "fast", 56),
        (5.5, "fast", 88),
        (12.0, "fast", 88),
        (18.0, "reference", 110),
    ],
)
def test_the_longest_recipe_that_fits_is_stretched(hours, recipe, epochs):
    plan = planned("imagenet", hours, rows="standard")
    (row,) = plan.rows
    assert (row.train.recipe, row.train.epochs) == (recipe, epochs)
    if recipe == "reference":
        assert row.epochs == 110
        assert row.is_fixed
    else:
        assert row.epochs >= row.train.epochs
        assert total(plan) == pytest.approx(3600 * hours)
    words = recipe if epochs in (16, 110) else f"fast --epochs {epochs}"
    assert re.search(rf"^\| standard \| +{words} \|", text_of(plan, hours), re.MULTILINE)


def test_milestones_are_never_rescaled():
    with pytest.raises(
        UserError,
        match=r"--recipe reference: too long for the budget: 110 epochs take 15\.\d+ hours .* never rescaled",
    ):
        planned("imagenet", 10.0, rows="standard", recipe="reference")
    plan = planned("imagenet", 20.0, rows="standard", recipe="reference")
    assert plan.rows[0].epochs == 110
    assert "stay unused: the recipe's milestones are never rescaled" in text_of(plan, 20.0)


def text_of(plan: Plan, hours: float, about: dict[str, Any] = IMAGENET, gpus: int = 0, price: float = 0.0) -> str:
    found = {**measured(about, [], hours), "gpus": gpus}
    return describe(plan, found, budget=f"--hours {hours:g}", used_sec=30.0, price=price)


def test_rows_are_left_out_where_all_would_be_too_short():
    plan = planned("imagenet", 12.0)
    assert [row.name for row in plan.rows] == ["standard", "random, 30 degrees", "worst10, 30 degrees"]
    assert [reason.split(":")[0] for reason in plan.left_out[:3]] == [
        "row random, 40 degrees",
        "row worst10, 40 degrees",
        "row nocrop",
    ]
    assert "the shortest recipe has 16" in plan.left_out[0]
    assert plan.rows[0].epochs >= 16


def test_rows_that_were_asked_for_are_kept_however_short():
    plan = planned("imagenet", 12.0, rows="standard;worst10:30;worst10:40")
    assert len(plan.rows) == 3
    assert 1 < plan.rows[0].epochs < 16
    assert "below 66.9 %, the result of 16 epochs" in "\n".join(expectation(plan, IMAGENET))


def test_a_budget_that_is_too_small_for_anything_is_refused():
    with pytest.raises(UserError, match="the budget is too small: 60 s are left after measuring, and one epoch of"):
        planned("imagenet", 1 / 60, rows="standard")


def test_what_measuring_overran_is_asked_for_in_full():
    asked: list[int] = []
    for left_sec in (-1, -61):
        with pytest.raises(UserError, match="the budget is too small: 0 s are left") as refused:
            planned("digits", left_sec / 3600, rows="standard")
        asked += map(int, re.findall(r"give at least (\d+) s more", str(refused.value.advice)))
    assert asked[1] == asked[0] + 60


@pytest.mark.parametrize(("gpus", "compile", "said"), [(1, "auto", True), (1, "false", False), (0, "auto", False)])
def test_a_budget_that_compilers_used_up_says_so(monkeypatch, gpus, compile, said):
    monkeypatch.setitem(DIGITS, "gpus", gpus)
    with pytest.raises(UserError, match="the budget is too small") as refused:
        planned("digits", 0.003, rows="standard", compile=compile)
    assert ("--compile false" in str(refused.value)) == said


def test_judging_has_its_share_and_says_what_it_leaves_out():
    plan = planned("digits", 0.04, rows="worst10:30")
    (row,) = plan.rows
    # The grid would take 300 (0.85 x 775 + 0.15 x 30) / 3000 = 66.3 s for all images, and may take 36.
    assert row.grid_per_class == int(30 * 0.25 * 144 / 66.325) == 16
    assert row.evaluation_sec == pytest.approx(
        300 * 11 / 3000 + 10 * row.grid_per_class * (0.85 * 775 + 0.15 * 30) / 3000
    )
    # A tenth of 144 s are 5 rounds of 7,750 views; 10 would be the most.
    assert row.landscape_per_class == 5
    assert [reason.split(",")[0] for reason in plan.left_out] == [
        "the grid of 775 views for all 300 images",
        "landscapes of 10 images of every class",
    ]
    assert all(r.grid_per_class == 0 and r.landscape_per_class == 10 for r in planned("digits", 1.0).rows)


def test_the_plan_is_told_with_costs_and_bounds():
    plan = planned("imagenet", 24.0, rows="standard;random:30")
    text = text_of(plan, 24.0, gpus=8, price=2.0)
    assert "budget: --hours 24: 24.0 h on 8 GPUs, 384.13 at 2 a GPU-hour; 30 s used" in text
    assert "| random, 30 degrees |" in text
    assert "8,000-4,000" in text
    assert "expected finish: 20" in text
    assert "an upper bound" in text and "BlurPool" in text
    assert "no published results for these images" in text_of(planned("digits", 0.25), 0.25, DIGITS)


def test_what_is_published_is_only_told_of_what_it_is_about():
    plan = planned("imagenet", 20.0, rows="standard", recipe="reference")
    assert expectation(plan, IMAGENET) == ["expected accuracy: the published table's"]
    assert "no published results" in expectation(plan, {**IMAGENET, "classes": 100})[0]
    changed = planned("imagenet", 20.0, rows="standard", recipe="reference", lr="1")
    assert expectation(changed, IMAGENET) == [
        "expected accuracy: the published table's, except for changed options (lr)"
    ]
    other = planned("imagenet", 12.0, rows="standard", arch="resnet34")
    assert "this network" in expectation(other, IMAGENET)[0]


def test_judging_with_flips_is_provided_for():
    once, twice = (planned("imagenet", 12.0, rows="standard", eval_flip=flip).rows[0] for flip in ("false", "true"))
    assert twice.evaluation_sec == pytest.approx(2 * once.evaluation_sec)
    # An evaluation has ten random views, however many a training has.
    assert planned("imagenet", 12.0, rows="worst10:30", views="2").rows[0].evaluation_sec == pytest.approx(
        planned("imagenet", 12.0, rows="worst10:30").rows[0].evaluation_sec
    )


def test_recipes_that_do_not_fit_the_other_flags_are_no_candidates():
    rows = requests(ReproduceConfig(data="imagenet", out="out", rows=("standard",)), {"warmup_epochs": "3"})
    assert candidate_recipes("", "imagenet", rows) == [
        {"recipe": "fast", "epochs": str(epochs)} for epochs in (16, 24, 32, 40, 56, 88)
    ]
    with pytest.raises(UserError, match="--lr"):
        candidate_recipes("", "imagenet", requests(ReproduceConfig(data="i", out="o"), {"lr": "-1"}))


def test_cold_starts_are_provided_for_in_every_task(monkeypatch):
    warm = planned("digits", 0.25).rows[0]
    monkeypatch.setitem(DIGITS, "training_cold_sec", 7.0)
    monkeypatch.setitem(DIGITS, "judging_cold_sec", 2.0)
    plan = planned("digits", 0.25)
    assert total(plan) == pytest.approx(900)
    for row in plan.rows:
        assert (row.start_sec, row.judging_start_sec) == (10.0 + 7.0, 10.0 + 2.0)
        assert row.landscape_per_class == warm.landscape_per_class > 0
        # An evaluation and a landscape begin cold, and a training.
        assert row.after_sec == pytest.approx(row.validation_sec + row.evaluation_sec + row.landscape_sec + 2 * 12.0)
        assert row.fixed_sec == pytest.approx(row.after_sec + 17.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(89, "89 s"), (540, "9.0 min"), (7200, "2.0 h"), (3600 * 59, "2.5 days")]
)
def test_durations_are_said_in_fitting_units(seconds, text):
    assert duration(seconds) == text


@pytest.fixture
def spent(tmp_path, monkeypatch):
    """Two rows to be trained, a quarter of an hour, and a clock that is wound by hand."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    plan = planned("digits", 0.25, rows="standard;worst10:30")
    rows = [
        dataclasses.replace(row, train=dataclasses.replace(row.train, out=str(tmp_path / str(number))))
        for number, row in enumerate(plan.rows)
    ]
    plan = Plan(rows, [], plan.end_sec)
    opened = active_plan.ActivePlan(
        plan,
        Budget("--hours 0.25", 0.25, None, 0),
        UsageMeter(tmp_path, 1000.0),
        DIGITS,
    )
    return opened, now


def test_rows_share_what_is_left(spent):
    opened, _ = spent
    first, _second = opened.plan.rows
    deadline = opened.training_deadline(first.train)
    # As much for each as planned: the first one ends where the second begins.
    assert deadline.until - 1000 == pytest.approx(first.fixed_sec + first.epochs * first.epoch_sec)
    assert deadline.after_sec == first.after_sec
    assert deadline.step_sec == first.step_sec


def test_the_last_row_gets_all_that_the_others_left(spent):
    opened, now = spent
    _first, second = opened.plan.rows
    for begun in (1100.0, 1300.0, 1600.0):
        now[0] = begun
        assert opened.training_deadline(second.train).until == pytest.approx(1900 - opened.plan.end_sec)


def test_a_row_without_time_is_not_begun(spent):
    opened, now = spent
    now[0] = 1900 - opened.plan.end_sec - opened.plan.rows[1].fixed_sec
    with pytest.raises(UserError, match="out of time for worst10, 30 degrees: only 0"):
        opened.training_deadline(opened.plan.rows[1].train)


def test_a_training_that_was_begun_is_ended_even_without_time(spent):
    opened, now = spent
    begun(opened.plan.rows[1].train.out, steps=30)
    now[0] = 1899.0
    assert opened.training_deadline(opened.plan.rows[1].train).until == 1900 - opened.plan.end_sec


def begun(out: str, steps: int) -> None:
    """A training that was saved after so many of 100 steps."""
    Path(out).mkdir(parents=True)
    state = {"format": 1, "model": {"w": torch.zeros(1)}, "segments": [[0, 0.0, 100]], "steps": steps}
    torch.save(state, Path(out) / "last.pt")


def test_what_is_trained_already_is_not_given_again(spent):
    opened, _ = spent
    first, second = opened.plan.rows
    begun(first.train.out, steps=75)
    deadline = opened.training_deadline(first.train)
    left = 900 - opened.plan.end_sec - first.fixed_sec - second.fixed_sec
    epochs = left / (0.25 * first.epoch_sec + second.epoch_sec)
    assert deadline.until - 1000 == pytest.approx(first.fixed_sec + 0.25 * epochs * first.epoch_sec)


def test_judging_of_the_last_row_may_use_what_is_left_and_no_more(spent):
    opened, now = spent
    first, second = opened.plan.rows
    end = 1900 - opened.plan.end_sec
    round_sec = 775 * 10 / 3000
    assert opened.evaluation_until(second.train) == pytest.approx(end - second.judging_start_sec - round_sec)
    assert opened.evaluation_until(first.train) == pytest.approx(
        1000 + first.judging_start_sec + 1.5 * first.evaluation_sec
    )
    now[0] = end - 60
    per_class, until = opened.landscape(second.train)
    assert until == end
    assert per_class == min(22, 4 * second.landscape_per_class)
    now[0] = end - second.judging_start_sec - 1.0
    assert opened.landscape(second.train)[0] == 0


@pytest.mark.parametrize("provided", [True, False])
def test_a_short_run_on_a_gpu_has_time_for_its_cold_evaluation(tmp_path, monkeypatch, provided):
    """Two minutes, of which measuring took 32 s. Processes take 12.5 s to start and end, and first passes 6 s."""
    cold_sec = 6.0
    of_gpu = {**DIGITS, "gpus": 1, "views_per_sec": 200_000.0}
    if provided:
        of_gpu |= {"training_cold_sec": cold_sec, "judging_cold_sec": cold_sec}
    now = [1032.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    plan = make_plan(
        requests(ReproduceConfig(data="digits", out=str(tmp_path), rows=("worst10:30",)), {"compile": "false"}),
        [{"recipe": "digits_linear"}],
        measured(of_gpu, [20_000.0], 88.5 / 3600),
        start_sec=12.5,
        judged=True,
        may_drop=False,
        keep_eval_every=False,
    )
    (row,) = plan.rows
    active = active_plan.ActivePlan(plan, Budget("", 120 / 3600, None, 1), UsageMeter(tmp_path, 1000.0), of_gpu)
    deadline = active.training_deadline(row.train)
    now[0] = deadline.until - deadline.after_sec + row.validation_sec  # the training keeps its time
    enough = active.evaluation_until(row.train) - now[0] >= 12.5 + cold_sec + row.evaluation_sec
    assert enough == provided
