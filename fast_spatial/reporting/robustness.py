"""The report's section of accuracy against the limits of the attack, from the landscapes in the runs' folders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fast_spatial.evaluation.landscape_files import Landscape
from fast_spatial.kernels.limits import GRID_ANGLES, GRID_SHIFTS, GRID_VIEWS
from fast_spatial.reporting.charts import AxesText, Series, dots, lines
from fast_spatial.reporting.document import Block, Figure, Figures, Table, Text
from fast_spatial.reporting.learning import legend
from fast_spatial.reporting.runs import Row
from fast_spatial.reporting.statistics import Interval, mean, wilson
from fast_spatial.reporting.tables import counts, percent

# The text for runs without any landscape.
NO_LANDSCAPE = (
    "No run here has a landscape: `launch.py landscape --checkpoint RUN/best.pt --data DATA --out RUN` makes one, "
    "and `launch.py report` shows it."
)
# Grid steps from the untouched image to the limit.
_ANGLE_STEPS, _SHIFT_STEPS = GRID_ANGLES // 2, GRID_SHIFTS // 2
# Limits of the table's columns, in grid steps of angle and translation.
_COLUMNS = ((0, 0), (5, 0), (10, 0), (15, 0), (0, 1), (0, 2), (15, 2))
_ACCURACY, _PERCENT = "top-1 accuracy, %", (0.0, 100.0)


class Mapped(NamedTuple):
    """A row's landscape, and the style of its lines."""

    name: str
    landscape: Landscape
    style: int


def mapped(rows: Sequence[Row]) -> list[Mapped]:
    """The landscapes with the same limits as the first."""
    found = [
        Mapped(row.name, run.landscape, style)
        for style, row in enumerate(rows)
        if (run := row.mapped) is not None and run.landscape is not None
    ]
    return [one for one in found if _limits(one) == _limits(found[0])]


def curves(rows: Sequence[Row]) -> list[Block]:
    """Accuracy against the limits of the attack."""
    found = mapped(rows)
    if not found:
        return [Text(NO_LANDSCAPE)]
    missing = [row.name for row in rows if row.name not in {one.name for one in found}]
    left_out = f" Without such a pass up to the same limits, and so not shown: {'; '.join(missing)}." if missing else ""
    return [
        Text(_subset(found) + left_out),
        Text(
            "An image counts as right within a limit if it is right on every view of the grid that stays within it, "
            f"the untouched one included; at both limits these are all {GRID_VIEWS} views. Bands and whiskers are 95 % "
            "intervals: Wilson's, and Student's t for means over several views, unless all are right or all wrong. The "
            "subset has as many images of every class, so they are a little too wide."
        ),
        Figures(_figures(found), 3, legend({one.name: one.style for one in found})),
        Text("The same in numbers: percent of images that are right on every view up to a limit."),
        _table(found),
    ]


def _limits(one: Mapped) -> tuple[float, float]:
    return one.landscape.about["degrees"], one.landscape.about["translate_px"]


def _subset(found: Sequence[Mapped]) -> str:
    about = found[0].landscape.about
    same = all(one.landscape.about["images"] == about["images"] for one in found)
    images = counts(one.landscape.about["num_images"] for one in found)
    return (
        f"Survivors cannot tell how accuracy depends on the limits, so all {GRID_VIEWS} views of a fixed subset were "
        f"judged: {images} validation images, as many of every class, drawn once for all models and named in each "
        f"run's `landscape.json`"
        + (". " if same else ", which are not the same for all rows here. ")
        + "Of several seeds, the first one's model is shown."
    )


def _figures(found: Sequence[Mapped]) -> list[Figure]:
    """Curves over the limit of angles, and points over the three limits of translations."""
    angles = AxesText("angle limit, degrees", _ACCURACY, "up to {}°")
    shifts = AxesText("translation limit, px at image size 224", _ACCURACY, "up to {} px")
    by_angle = (
        ("Right on every view: rotations alone", 0, True),
        ("Right on every view: rotations, all translations", _SHIFT_STEPS, True),
        ("Mean over the views: rotations alone", 0, False),
    )
    by_shift = (
        ("Right on every view: translations alone", 0, True),
        ("Right on every view: translations, all rotations", _ANGLE_STEPS, True),
        ("Mean over the views: translations alone", 0, False),
    )
    figures = []
    for caption, steps, every in by_angle:
        limits = [(a, steps) for a in range(_ANGLE_STEPS + 1)]
        series = [_series(one, one.landscape.angles_deg[_ANGLE_STEPS:], limits, every=every) for one in found]
        figures.append(Figure(caption, lines(caption, angles, series, _PERCENT)))
    for caption, steps, every in by_shift:
        limits = [(steps, s) for s in range(_SHIFT_STEPS + 1)]
        series = [_series(one, one.landscape.shifts_px[_SHIFT_STEPS:], limits, every=every) for one in found]
        figures.append(Figure(caption, dots(caption, shifts, series, _PERCENT)))
    return figures


def _series(one: Mapped, xs: Sequence[float], limits: Sequence[tuple[int, int]], *, every: bool) -> Series:
    """A row's accuracy in percent within each of these limits, in grid steps of angle and translation."""
    found = [_over_views(one.landscape.within(*steps), every=every) for steps in limits]
    values = [100 * interval.value for interval in found]
    return Series(one.name, one.style, xs, values, [(100 * interval.low, 100 * interval.high) for interval in found])


def _table(found: Sequence[Mapped]) -> Table:
    degrees, px = _limits(found[0])
    head = [
        *("trained as", "untouched"),
        *(f"{degrees * a / _ANGLE_STEPS:g}°" for a, _ in _COLUMNS[1:4]),
        *(f"{px * t / _SHIFT_STEPS:.3g} px" for _, t in _COLUMNS[4:6]),
        f"{degrees:g}°, {px:.3g} px",
    ]
    shown = [[percent(_over_views(one.landscape.within(*steps), every=True)) for steps in _COLUMNS] for one in found]
    return Table(head, [[one.name, *cells] for one, cells in zip(found, shown)])


def _over_views(correct: NDArray[np.bool_], *, every: bool) -> Interval:
    """Accuracy over images, [N, views]: right on every view, or the mean share of the views."""
    if every or correct.shape[1] == 1 or correct.all() or not correct.any():  # equal shares have no spread
        return wilson(int(correct.all(axis=1).sum()), len(correct))
    return mean(correct.mean(axis=1).tolist()).clipped()
