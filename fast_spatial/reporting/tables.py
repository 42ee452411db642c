"""Numbers as text, and two small Markdown tables: our results, and the published ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fast_spatial.config.modes import MODES, PUBLISHED, row_name
from fast_spatial.runtime.text import aligned

if TYPE_CHECKING:  # it needs SciPy, and `reproduce` needs only the tables
    from fast_spatial.reporting.statistics import Interval

# The placeholder of a missing number.
DASH = "–"
ATTACKS = ("natural", "random", "worst10", "grid")
HEADS = ("Natural", "Random", "Worst-of-10", "Exhaustive (775)")


def results_table(results: Sequence[dict[str, Any]], title: str) -> str:
    """Top-1 accuracy in percent of every row (the mean over its seeds, +- half their range), as aligned Markdown."""
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault((result["mode"], result["degrees"]), []).append(result)
    lines = [[title, *HEADS]]
    for (mode, degrees), runs in rows.items():
        cells = []
        for attack in ATTACKS:
            values = [run[f"{attack}_top1_pct"] for run in runs if run[f"{attack}_top1_pct"] is not None]
            spread = f" ±{(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1f}{spread}" if values else DASH)
        lines.append([row_name(mode, degrees), *cells])
    return aligned(lines)


def grid_images(judged: dict[str, Any]) -> int:
    """The number of images that met the grid, from an evaluation's summary or a reproduction's result; default all."""
    return int(judged.get("grid_num_images", judged["num_images"]))


def grid_note(judged: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """A sentence on rows whose grid met fewer images than the other attacks; "" without such rows.

    Args:
        judged: name of the row, and summary or result, of every run.

    """
    few = dict.fromkeys(
        f"{_count(grid_images(found))} of {found['num_images']:,} ({name})"
        for name, found in judged
        if grid_images(found) < found["num_images"]
    )
    return f"The grid met fewer images than the other attacks: {'; '.join(few)}." if few else ""


def counts(numbers: Iterable[int]) -> str:
    """Different numbers, ascending: "300", or "100 or 300"."""
    return " or ".join(f"{number:,}" for number in sorted({*numbers}))


def _count(images: int) -> str:
    return f"{images:,}" if images else "none"


def published_table(rows: Sequence[tuple[str, float]]) -> str:
    """The published rows of ImageNet for these (mode, degrees)."""
    known = {(mode, 0.0 if MODES[mode].warps == 0 else degrees) for mode, degrees in rows}
    lines = [["published, ImageNet", *HEADS]]
    lines += [
        [row_name(mode, degrees), *(f"{value:.1f}" for value in values)]
        for (mode, degrees), values in PUBLISHED.items()
        if (mode, degrees) in known
    ]
    return aligned(lines)


def percent(interval: Interval | None) -> str:
    """A share in percent with its limits, if they are known: "71.3 [70.9, 71.7]"."""
    return _with_limits(interval, lambda value: f"{100 * value:.1f}")


def points(interval: Interval | None) -> str:
    """A difference of shares in percentage points, with its limits, if they are known; all with signs."""
    return _with_limits(interval, lambda value: signed(100 * value, ".1f", plus=True))


def _with_limits(interval: Interval | None, show: Callable[[float], str]) -> str:
    if interval is None:
        return DASH
    limits = "" if math.isnan(interval.low) else f" [{show(interval.low)}, {show(interval.high)}]"
    return show(interval.value) + limits


def signed(value: float, layout: str = ".3g", *, plus: bool = False) -> str:
    """A number with a typographic minus sign; a number that is shown as zero has no sign."""
    text = format(abs(value), layout)
    if float(text) == 0:
        return text
    return f"{'−' if value < 0 else '+' if plus else ''}{text}"
