"""The report's section of learning curves."""

from __future__ import annotations

from collections.abc import Sequence

from fast_spatial.reporting.charts import AxesText, Series, key, lines
from fast_spatial.reporting.document import Block, Figure, Figures, LegendEntry, Text
from fast_spatial.reporting.runs import Row

_LOSS, _ACCURACY = "cross-entropy, nats", "top-1 accuracy, %"
# (event of the log, its number, caption, label of the y axis); one line of figures for each event
_CURVES = (
    ("train", "loss", "Training loss, on the views trained on", _LOSS),
    ("train", "top1_pct", "Training accuracy, on the views trained on", _ACCURACY),
    ("evaluation", "top1_pct", "Validation accuracy, untouched images", _ACCURACY),
    ("evaluation", "attacked_top1_pct", "Validation accuracy under each row's training attack", _ACCURACY),
    ("chosen", "untransformed_pct", "Training images whose worst view is the untouched one", "share of images, %"),
)


def learning(rows: Sequence[Row]) -> list[Block]:
    """Loss and accuracy over epochs."""
    figures = []
    for event, name, caption, y_label in _CURVES:
        series = _series(rows, event, name)
        if any(len(one.xs) > 1 for one in series):
            figures.append(Figure(caption, lines(caption, AxesText("epoch", y_label, "epoch {}"), series)))
    if chosen := _chosen_rotations(rows):
        caption = "Rotations of the worst views in the last epoch, untouched ones aside"
        axes = AxesText("rotation, degrees", "times as often as drawn", "{} degrees")
        highest = max(1.0, *(y for one in chosen for y in one.ys))
        figures.append(Figure(caption, lines(caption, axes, chosen, (0.0, highest), level=1.0)))
    if not figures:
        return [Text("No run here has finished two epochs.")]
    text = (
        "A line per run; seeds of one row look alike. Training numbers are of the weights as they changed during the "
        "epoch. Rows that train without warps have no training attack."
    )
    if all(len(run.records("evaluation")) < 2 for row in rows for run in row.runs):
        text += " No training was evaluated more than once, so there are no curves of validation accuracy."
    styles = {one.name: one.style for one in _series(rows, "train", "loss")}
    return [Text(text), Figures(figures, 2, legend(styles))]


def legend(styles: dict[str, int]) -> list[LegendEntry]:
    """What the lines stand for: names of rows, with the number of their style."""
    return [LegendEntry(name, svg=key(style)) for name, style in styles.items()]


def _series(rows: Sequence[Row], event: str, name: str) -> list[Series]:
    """A line for each run; those of one row share a style."""
    found = []
    for style, row in enumerate(rows):
        for run in row.runs:
            records = [record for record in run.records(event) if record.get(name) is not None]
            if records:
                found.append(Series(row.name, style, [r["epoch"] for r in records], [r[name] for r in records]))
    return found


def _chosen_rotations(rows: Sequence[Row]) -> list[Series]:
    """How often each run's last epoch chose a rotation, as a multiple of how often it was drawn, over bins' centers.

    All rotations between the limits are drawn equally often, so a choice without preference has the value 1 everywhere.
    """
    found = []
    for style, row in enumerate(rows):
        for run in row.runs:
            counts, limit = next(((r["degrees"], r["limit_degrees"]) for r in reversed(run.records("chosen"))), ([], 0))
            if total := sum(counts):
                width = 2 * limit / len(counts)
                centers = [round((number + 0.5) * width - limit, 2) for number in range(len(counts))]
                found.append(Series(row.name, style, centers, [len(counts) * count / total for count in counts]))
    return found
