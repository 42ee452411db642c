"""Goals for the figures of `benchmarks/gpu.sh`: result, ceiling, goal on one H100, verdict.

Imports only the standard library. Its input is the content of OUT/gpu.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Goal:
    """A line of the table.

    Attributes:
        what: description.
        stages: stages to search, in order.
        pattern: regular expression of the measurement's whole name.
        figure: name of the figure.
        unit: unit of the figure.
        goal: goal on one H100 of 80 GB; None: no goal.
        at_most: whether smaller is better.
        ceiling: name of another figure of the measurement, an upper bound.
        bounds: names of other lines; the smallest of their results is an upper bound.

    """

    what: str
    stages: tuple[str, ...]
    pattern: str
    figure: str
    unit: str
    goal: float | None = None
    at_most: bool = False
    ceiling: str = ""
    bounds: tuple[str, ...] = ()


class Row(NamedTuple):
    """A goal and its result, as text; `value` and `met` are None if there is no number or no goal."""

    what: str
    result: str
    ceiling: str
    goal: str
    verdict: str
    value: float | None
    met: bool | None


_MEMORY = ("eager", "compiled", "large")
_FILES = ("train", "train_compiled", "placements")
_TRAIN = ("images_per_sec", "images/s")
_SCORE = ("views_per_sec", "views/s")
_TO_TRAIN, _TO_SCORE = "ceiling_images_per_sec", "ceiling_views_per_sec"
GOALS = (
    Goal("fill, written", ("machine",), "fill", "written_gb_per_sec", "GB/s"),
    Goal("copy, read and written", ("machine",), "copy", "read_and_written_gb_per_sec", "GB/s"),
    Goal("matrix product, bfloat16", ("machine",), "matmul_bfloat16", "tflops", "TFLOP/s"),
    Goal("standard, in memory", _MEMORY, r"train_standard_.*", *_TRAIN, 12_000, ceiling=_TO_TRAIN),
    Goal("worst10, in memory", _MEMORY, r"train_worst10_.*", *_TRAIN, ceiling=_TO_TRAIN),
    Goal("score, 224 px", _MEMORY, r"score_(224|32)px_.*", *_SCORE, 60_000, ceiling=_TO_SCORE),
    Goal("score, beyond 2^31 elements", ("large",), r"score_.*", *_SCORE, ceiling=_TO_SCORE),
    Goal("Triton warp, of a fill", ("eager",), "triton_warp", "share_of_fill_pct", "%", 45),
    Goal("Triton normalize, of a fill", ("eager",), "triton_normalize", "share_of_fill_pct", "%"),
    Goal("DALI warp, a batch", ("eager",), "dali_views", "ms", "ms", 10, at_most=True),
    Goal("fused convolution and ReLU", ("eager",), r"conv_relu_64_64_.*", "times_faster", "x"),
    Goal("loader alone, standard", ("loader",), r"loader_standard_.*", *_TRAIN),
    Goal("loader alone, worst10", ("loader",), r"loader_worst10_.*", *_TRAIN),
    Goal(
        "standard, from files",
        _FILES,
        r"train_standard.*",
        *_TRAIN,
        8_000,
        bounds=("standard, in memory", "loader alone, standard"),
    ),
    Goal(
        "worst10, from files",
        _FILES,
        r"train_worst10.*",
        *_TRAIN,
        3_500,
        bounds=("worst10, in memory", "loader alone, worst10"),
    ),
    Goal("wait for data, worst10", ("train",), "train_worst10", "data_wait_pct", "%", 3, at_most=True),
    Goal("grid, bfloat16", ("grid",), r"grid_bfloat16_.*", *_SCORE, 50_000, ceiling=_TO_SCORE),
    Goal("grid, tf32", ("grid",), r"grid_tf32_.*", *_SCORE, ceiling=_TO_SCORE),
    Goal("grid, float32", ("grid",), r"grid_float32_.*", *_SCORE, 10_000, ceiling=_TO_SCORE),
)


_NOT_ASKED = "not run"


def measurements(result: dict[str, Any], stages: tuple[str, ...], pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, figures) of the measurements in some stages whose whole name matches the pattern."""
    for stage in stages:
        for name, figures in result["stages"].get(stage, {}).get("measured", {}).items():
            if re.fullmatch(pattern, name):
                yield name, figures


def rows(result: dict[str, Any]) -> list[Row]:
    """Every goal with its best measurement."""
    found: dict[str, Row] = {}
    for goal in GOALS:  # bounds come before the goals that they bound
        row = _row(goal, result)
        bounds = [value for what in goal.bounds if (value := found[what].value) is not None]
        found[goal.what] = row._replace(ceiling=_number(min(bounds))) if bounds and row.value is not None else row
    return list(found.values())


def _row(goal: Goal, result: dict[str, Any]) -> Row:
    aim = "" if goal.goal is None else f"{'at most ' if goal.at_most else ''}{_number(goal.goal)}"
    found = [
        (figures[goal.figure], name, figures)
        for name, figures in measurements(result, goal.stages, goal.pattern)
        if goal.figure in figures
    ]
    if not found:
        return Row(goal.what, "-", "", aim, _why_not(goal, result), None, None)
    value, name, figures = (min if goal.at_most else max)(found, key=lambda item: item[0])
    ceiling = _number(figures[goal.ceiling]) if goal.ceiling in figures else ""
    label = f"{_number(value)} {goal.unit}" + (", compiled" if name.endswith("_compiled") else "")
    if goal.goal is None:
        return Row(goal.what, label, ceiling, aim, name, value, None)
    if result["dry"]:
        return Row(goal.what, label, ceiling, aim, f"dry run: {name}", value, None)
    met = value <= goal.goal if goal.at_most else value >= goal.goal
    missed = f"{value / goal.goal:.1f} x the goal" if goal.at_most else f"{100 * value / goal.goal:.0f} % of the goal"
    verdict = "met" if met else f"missed ({missed})"
    return Row(goal.what, label, ceiling, aim, f"{verdict}: {name}", value, met)


def _why_not(goal: Goal, result: dict[str, Any]) -> str:
    """Why there is no number: the state of the measurement, or of its stage."""
    for name, figures in measurements(result, goal.stages, goal.pattern):
        for kind in ("error", "skipped"):
            if kind in figures:
                return f"{kind}: {name}: {figures[kind]}"[:100]
        if "out_of_memory" in figures:
            return f"out of memory: {name}"
    states = [
        f"{stage}: {about['state']}" for stage in goal.stages if (about := result["stages"].get(stage)) is not None
    ]
    return "; ".join(states) or _NOT_ASKED


def table(result: dict[str, Any]) -> list[str]:
    """The closing lines of a run: the goals, then the state of every stage."""
    lines = [("dry run on the CPU" if result["dry"] else "", "result", "ceiling", "goal", "verdict")]
    lines += [row[:5] for row in rows(result) if row.verdict != _NOT_ASKED]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    shown = [
        "  ".join([f"{line[0]:<{widths[0]}}", *(f"{line[n]:>{widths[n]}}" for n in (1, 2, 3)), line[4]])
        for line in lines
    ]
    ended = [f"{name} {about['state']}" for name, about in result["stages"].items()]
    return [*(line.rstrip() for line in shown), "stages: " + "; ".join(ended)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
