"""The report's sections on robustness: curves over the limits, maps over angle and translation, the worst views.

The data are the landscapes that `launch.py landscape` wrote into the folders of the runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fast_spatial.evaluation.landscape import Landscape
from fast_spatial.kernels.spatial import GRID_ANGLES, GRID_SHIFTS, GRID_VIEWS
from fast_spatial.reporting.charts import Scale, Series, heat_map, line_chart
from fast_spatial.reporting.document import Block, Card, Figure, Figures, Pictures, Table, Text, percent, signed
from fast_spatial.reporting.runs import Row
from fast_spatial.reporting.statistics import Interval, mean, wilson

# Grid steps from the untouched image to the limit: of angles, of translations.
_STEPS = (GRID_ANGLES // 2, GRID_SHIFTS // 2)
# (caption, whether the limit varies over angles, whether all views of the other kind are included, every view or mean)
_CURVES = (
    ("Right on every view: rotations alone", True, False, True),
    ("Right on every view: rotations, all translations", True, True, True),
    ("Mean over the views: rotations alone", True, False, False),
    ("Right on every view: translations alone", False, False, True),
    ("Right on every view: translations, all rotations", False, True, True),
    ("Mean over the views: translations alone", False, False, False),
)
_MAPPED_IMAGES = 3


def curves(rows: Sequence[Row]) -> list[Block]:
    """Accuracy against the limits of the attack."""
    found, left_out = _mapped(rows)
    if not found:
        return [Text(no_landscape())]
    figures = []
    for caption, of_angles, with_others, every in _CURVES:
        series = []
        for name, landscape, style in found:
            limits = (landscape.angles_deg if of_angles else landscape.shifts_px)[_STEPS[not of_angles] :]
            others = _STEPS[of_angles] if with_others else 0
            parts = (landscape.within(*((s, others) if of_angles else (others, s))) for s in range(len(limits)))
            curve = [_over_views(part, every=every) for part in parts]
            points = [(limit, 100 * one.value) for limit, one in zip(limits, curve)]
            series.append(Series(name, points, style, [(100 * one.low, 100 * one.high) for one in curve]))
        x_label = "angle limit, degrees" if of_angles else "translation limit, px at side 224"
        marks = None if of_angles else limits  # translations have only three limits
        chart = line_chart(caption, x_label, "top-1 accuracy, %", series, x_ticks=marks, y_range=(0.0, 100.0))
        figures.append(Figure(caption, chart))
    columns = [(0, 0), (5, 0), (10, 0), (15, 0), (0, 1), (0, 2), (15, 2)]
    degrees, px = found[0].landscape.about["degrees"], found[0].landscape.about["translate_px"]
    head = [
        *("trained as", "untouched"),
        *(f"{degrees * a / _STEPS[0]:g}°" for a, _ in columns[1:4]),
        *(f"{px * t / _STEPS[1]:.3g} px" for _, t in columns[4:6]),
        f"{degrees:g}°, {px:.3g} px",
    ]
    lines = [
        [name, *(percent(_over_views(landscape.within(*limits), every=True)) for limits in columns)]
        for name, landscape, _ in found
    ]
    return [
        Text(_subset(found) + left_out),
        Text(
            "An image counts as right within a limit if it is right on every view of the grid that stays within it, "
            f"the untouched one included; at both limits these are all {GRID_VIEWS} views. Bands are 95 % intervals: "
            "Wilson's, and Student's t for means over views. The subset has as many images of every class, so they are "
            "a little too wide."
        ),
        Figures(figures),
        Text("The same in numbers: percent of images that are right on every view up to a limit."),
        Table(head, lines),
    ]


def _over_views(correct: NDArray[np.bool_], *, every: bool) -> Interval:
    """Accuracy over images, [N, views]: right on every view, or the mean share of the views."""
    if every:
        return wilson(int(correct.all(axis=1).sum()), len(correct))
    found = mean(correct.mean(axis=1).tolist())
    return Interval(found.value, max(0.0, found.low), min(1.0, found.high))


class _Mapped(NamedTuple):
    """A row's landscape, and the style of its lines."""

    name: str
    landscape: Landscape
    style: int


def _mapped(rows: Sequence[Row]) -> tuple[list[_Mapped], str]:
    """The landscapes with the same limits as the first, and a sentence on the others."""
    found = [
        _Mapped(row.name, run.landscape, style)
        for style, row in enumerate(rows)
        if (run := row.mapped) is not None and run.landscape is not None
    ]

    def limits(one: _Mapped) -> tuple[float, float]:
        return one.landscape.about["degrees"], one.landscape.about["translate_px"]

    alike = [one for one in found if limits(one) == limits(found[0])]
    missing = [row.name for row in rows if row.name not in {one.name for one in alike}]
    sentence = f" Without such a pass up to the same limits, and so not shown: {', '.join(missing)}." if missing else ""
    return alike, sentence


def _subset(found: Sequence[_Mapped]) -> str:
    about = found[0].landscape.about
    same = all(one.landscape.about["images"] == about["images"] for one in found)
    counts = " or ".join(str(n) for n in sorted({one.landscape.about["num_images"] for one in found}))
    return (
        f"Survivors cannot tell how accuracy depends on the limits, so all {GRID_VIEWS} views of a fixed subset were "
        f"judged: {counts} validation images, as many of every class, drawn once for all models and named in each "
        f"run's `landscape.json`"
        + (". " if same else ", which are not the same for all rows here. ")
        + "Of several seeds, the first one's model is shown."
    )


def no_landscape() -> str:
    """The text for runs without any landscape."""
    return (
        "No run here has a landscape: `launch.py landscape --checkpoint RUN/best.pt --data DATA --out RUN` makes one, "
        "and `launch.py report` shows it."
    )


def landscapes(rows: Sequence[Row]) -> list[Block]:
    """Loss and accuracy over angle and translation, of models and of single images."""
    found, _ = _mapped(rows)
    if not found:
        return [Text(no_landscape())]
    maps = [(one.name, one.landscape) for one in found]
    losses = [landscape.loss.mean(axis=(0, 3)) for _, landscape in maps]
    loss_scale = _scale_of(losses, "mean cross-entropy, nats")
    accuracy_scale = Scale(0.0, 100.0, "top-1 accuracy, %")
    model_figures = []
    for (name, landscape), loss in zip(maps, losses):
        for caption, values, scale in (
            (f"{name}: accuracy, mean over ty", 100 * landscape.correct.mean(axis=(0, 3)), accuracy_scale),
            (f"{name}: right for all five ty", 100 * landscape.correct.all(axis=3).mean(axis=0), accuracy_scale),
            (f"{name}: loss, mean over ty", loss, loss_scale),
        ):
            model_figures.append(Figure(caption, _model_map(caption, landscape, values.T, scale)))
    shown = [
        (name, landscape, sample["image"])
        for name, landscape in maps
        for sample in _spread(landscape.about["samples"], _MAPPED_IMAGES)
    ]
    image_scale = _scale_of([landscape.loss[image] for _, landscape, image in shown], "cross-entropy, nats")
    image_figures = []
    for name, landscape, image in shown:
        about = landscape.about["images"][image]
        caption = f"{name}: `{about['path']}`, class {about['class']}"
        image_figures.append(Figure(caption, _image_map(caption, landscape, image, image_scale)))
    return [
        Text(
            f"Of the same {maps[0][1].about['num_images']} images as the curves above. Models: columns are the "
            "31 angles, rows the 5 horizontal translations tx (a positive one moves the content to the left). Over "
            "the 5 vertical ones, ty, the first map takes the mean, the second demands that an image is right for all "
            "five, and the third shows the mean loss."
        ),
        Figures(model_figures),
        Text(
            f"Single images: all {GRID_VIEWS} views, none averaged. Rows are the 25 translations, with ty rising from "
            f"top to bottom within each tx (a positive one moves the content up); a dot marks a view that is judged "
            f"wrong."
        ),
        Figures(image_figures),
    ]


def _spread(samples: Sequence[dict[str, Any]], count: int) -> Sequence[dict[str, Any]]:
    return samples[:: max(1, len(samples) // count)][:count]


def _scale_of(losses: Sequence[NDArray[np.float32]], label: str) -> Scale:
    """One scale for maps that are compared: up to the 98th percentile, rounded."""
    values = np.concatenate([loss.ravel() for loss in losses])
    highest = max(float(np.percentile(values, 98)), 0.01)
    power = 10.0 ** math.floor(math.log10(highest))
    high = next(power * m for m in (1, 1.5, 2, 3, 4, 6, 8, 10) if power * m >= highest * 0.999)
    return Scale(0.0, high, label, clipped=bool(values.max() > high))


def _angle_ticks(landscape: Landscape) -> list[tuple[float, str]]:
    return [(a, signed(angle)) for a, angle in enumerate(landscape.angles_deg) if a % 5 == 0]


def _model_map(caption: str, landscape: Landscape, values: NDArray[np.float64], scale: Scale) -> str:
    ticks = [(row, signed(shift)) for row, shift in enumerate(landscape.shifts_px)]
    return heat_map(
        caption,
        "angle, degrees",
        "tx, px at side 224",
        values.tolist(),
        scale,
        x_ticks=_angle_ticks(landscape),
        y_ticks=ticks,
        row_height=24,
    )


def _image_map(caption: str, landscape: Landscape, image: int, scale: Scale) -> str:
    # [31, tx, ty] to rows of (tx, ty).
    loss, correct = (
        values[image].transpose(1, 2, 0).reshape(-1, GRID_ANGLES) for values in (landscape.loss, landscape.correct)
    )
    middle = GRID_SHIFTS // 2
    return heat_map(
        caption,
        "angle, degrees",
        "tx, px at side 224 (ty within)",
        loss.tolist(),
        scale,
        x_ticks=_angle_ticks(landscape),
        y_ticks=[(row * GRID_SHIFTS + middle, signed(shift)) for row, shift in enumerate(landscape.shifts_px)],
        row_height=7,
        marked=[(int(r), int(c)) for r, c in np.argwhere(~correct)],
        rows_per_group=GRID_SHIFTS,
    )


def worst_views(rows: Sequence[Row]) -> list[Block]:
    """Sample images, untouched and as the view of highest loss."""
    blocks: list[Block] = []
    for row in rows:
        run = row.mapped
        if run is None or run.landscape is None:
            continue
        images = run.landscape.about["images"]
        cards = []
        for sample in run.landscape.about["samples"]:
            about = images[sample["image"]]
            pictures = [
                (run.folder / sample[kind], f"{about['path']}, {kind}{' view' if kind == 'worst' else ''}")
                for kind in ("untouched", "worst")
            ]
            if all(path.is_file() for path, _ in pictures):
                cards.append(Card(pictures, _worst_caption(about["class"], sample)))
        if cards:
            blocks.append(Pictures(row.name, cards))
    if not blocks:
        return [Text(f"There are no pictures. {no_landscape()}")]
    about_them = (
        f"Images spread evenly over the subset, not chosen by their looks: untouched on the left, and on the right the "
        f"view of highest loss of all {GRID_VIEWS}."
    )
    return [Text(about_them), *blocks]


def _worst_caption(name: str, sample: dict[str, Any]) -> str:
    said = sample["worst_predicted"]
    verdict = f"class {name}, still right" if said == name else f"class {name}, taken for {said}"
    untouched, worst = (max(0.0, sample[f"{kind}_loss"]) for kind in ("untouched", "worst"))
    return (
        f"{verdict}; {signed(sample['degrees'])}°, tx {signed(sample['tx_px'])}, ty {signed(sample['ty_px'])} px; "
        f"loss {untouched:.2f} to {worst:.2f}"
    )
