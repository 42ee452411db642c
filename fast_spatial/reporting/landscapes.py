"""The report's sections on the landscapes: loss and accuracy over angle and translation, and the worst views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fast_spatial.evaluation.landscape_files import Landscape
from fast_spatial.kernels.limits import GRID_VIEWS
from fast_spatial.reporting.charts import Cells, Scale, colour_bar, heat_map, profiles, scale_of
from fast_spatial.reporting.document import Block, Card, Figure, Figures, LegendEntry, Pictures, Text
from fast_spatial.reporting.robustness import NO_LANDSCAPE, Mapped, mapped
from fast_spatial.reporting.runs import Row, Run
from fast_spatial.reporting.tables import counts, signed

_IMAGES = 3


def landscapes(rows: Sequence[Row]) -> list[Block]:
    """Loss and accuracy over angle and translation, of models and of single images."""
    found = mapped(rows)
    if not found:
        return [Text(NO_LANDSCAPE)]
    limit, images = found[0].landscape.about["degrees"], counts(one.landscape.about["num_images"] for one in found)
    return [
        Text(
            f"Of the images of the curves above ({images}). Models: columns are the 31 angles, rows the 5 horizontal "
            "translations tx (a positive one moves the content to the left). Over the 5 vertical ones, ty, the first "
            "map takes the mean, the second demands that an image is right for all five, and the third shows the mean "
            "loss."
        ),
        _model_maps(found),
        Text(
            f"Single images: all {GRID_VIEWS} views, none averaged. The 25 panels are the translations, each where it "
            f"moves the content: the middle panel does not move it, the top left one moves it up and to the left. "
            f"Within a panel the angle goes from {signed(-limit)}° to {signed(limit)}°."
        ),
        _image_maps(found),
    ]


def _model_maps(found: Sequence[Mapped]) -> Figures:
    """Means over images, and over vertical translations: three maps of each model."""
    loss_scale = scale_of([one.landscape.loss.mean(axis=(0, 3)) for one in found], "mean cross-entropy, nats")
    accuracy_scale = Scale(100.0, "top-1 accuracy, %")
    figures = []
    for name, landscape, _ in found:
        maps = (
            ("accuracy, mean over ty", 100 * landscape.correct.mean(axis=(0, 3)), accuracy_scale),
            ("right for all five ty", 100 * landscape.correct.all(axis=3).mean(axis=0), accuracy_scale),
            ("loss, mean over ty", landscape.loss.mean(axis=(0, 3)), loss_scale),
        )
        columns, rows = _cells("angle, degrees", landscape.angles_deg, "{}°"), _shifts("tx", landscape)
        for kind, values, scale in maps:
            caption = f"{name}: {kind}"
            figures.append(Figure(caption, heat_map(caption, values.T, scale, columns, rows)))
    return Figures(figures, 3, [LegendEntry(one.label, svg=colour_bar(one)) for one in (accuracy_scale, loss_scale)])


def _image_maps(found: Sequence[Mapped]) -> Figures:
    """The losses of a few images of each model, on one scale."""
    shown = [
        (name, landscape, sample["image"])
        for name, landscape, _ in found
        for sample in _spread(landscape.about["samples"], _IMAGES)
    ]
    scale = scale_of([landscape.loss[image] for _, landscape, image in shown], "cross-entropy, nats")
    figures = []
    for name, landscape, image in shown:
        about = landscape.about["images"][image]
        caption = f"{name}: `{about['path']}`, class {about['class']}"
        # [31, tx, ty] to [ty, tx, 31], as the content moves: up for a positive ty, to the left for a positive tx.
        loss, correct = (one[image].transpose(2, 1, 0)[::-1, ::-1] for one in (landscape.loss, landscape.correct))
        across, down = (_shifts(name, landscape, reverse=True) for name in ("tx", "ty"))
        angles = [f"{signed(angle)}°" for angle in landscape.angles_deg]
        columns = Cells(
            f"{across.label} (in a panel: angle, {angles[0]} to {angles[-1]})",
            across.numbers,
            [f"{shift}, {angle}" for shift in across.names for angle in angles],
        )
        figures.append(Figure(caption, profiles(caption, loss, ~correct, scale, columns, down)))
    high = f"{scale.high:.3g} nats" + (" or more" if scale.clipped else "")
    legend = [
        LegendEntry(f"cross-entropy, from 0 to {high} (height of a panel)", patch="loss"),
        LegendEntry("judged wrong", patch="wrong"),
    ]
    return Figures(figures, 3, legend)


def _spread(samples: Sequence[dict[str, Any]], count: int) -> Sequence[dict[str, Any]]:
    return samples[:: max(1, len(samples) // count)][:count]


def _shifts(name: str, landscape: Landscape, *, reverse: bool = False) -> Cells:
    shifts = landscape.shifts_px[::-1] if reverse else landscape.shifts_px
    return _cells(f"{name}, px at image size 224", shifts, f"{name} {{}} px")


def _cells(label: str, values: Sequence[float], name: str) -> Cells:
    numbers = [signed(value) for value in values]
    return Cells(label, numbers, [name.format(number) for number in numbers])


def worst_views(rows: Sequence[Row]) -> list[Block]:
    """Sample images, untouched and as the view of highest loss."""
    cards = {row.name: _cards(run, run.landscape) for row in rows if (run := row.mapped) and run.landscape}
    blocks = [Pictures(name, found) for name, found in cards.items() if found]
    if not blocks:
        return [Text(f"There are no pictures. {NO_LANDSCAPE}")]
    about_them = (
        f"Images spread evenly over the subset, not chosen by their looks: untouched on the left, and on the right the "
        f"view of highest loss of all {GRID_VIEWS}."
    )
    return [Text(about_them), *blocks]


def _cards(run: Run, landscape: Landscape) -> list[Card]:
    """The sample images whose pictures are in the run's folder."""
    cards = []
    for sample in landscape.about["samples"]:
        about = landscape.about["images"][sample["image"]]
        pictures = [
            (run.folder / sample[kind], f"{about['path']}, {kind}{' view' if kind == 'worst' else ''}")
            for kind in ("untouched", "worst")
        ]
        if all(path.is_file() for path, _ in pictures):
            cards.append(Card(pictures, _worst_caption(about["class"], sample)))
    return cards


def _worst_caption(name: str, sample: dict[str, Any]) -> str:
    said = sample["worst_predicted"]
    verdict = f"class {name}, still right" if said == name else f"class {name}, taken for {said}"
    untouched, worst = (max(0.0, sample[f"{kind}_loss"]) for kind in ("untouched", "worst"))
    return (
        f"{verdict}; {signed(sample['degrees'])}°, tx {signed(sample['tx_px'])}, ty {signed(sample['ty_px'])} px; "
        f"loss {untouched:.2f} to {worst:.2f} nats"
    )
