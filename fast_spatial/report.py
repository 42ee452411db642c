"""The table of a reproduction: ours beside the published one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fast_spatial.config import PUBLISHED

ATTACKS = ("natural", "random", "worst10", "grid")
HEADS = ("Natural", "Random", "Worst-of-10", "Exhaustive (775)")


def row_name(mode: str, degrees: float) -> str:
    """How tables name a row: modes that train without warps have no degrees."""
    return mode if mode in ("nocrop", "standard") else f"{mode}, {degrees:g} degrees"


def results_table(results: Sequence[dict[str, Any]], title: str) -> str:
    """Top-1 accuracy in percent of every row (the mean over its seeds, +- half their range), as aligned Markdown."""
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault((result["mode"], result["degrees"]), []).append(result)
    lines = [[title, *HEADS]]
    for (mode, degrees), runs in rows.items():
        cells = []
        for attack in ATTACKS:
            values = [run[f"{attack}_top1_pct"] for run in runs]
            spread = f" ±{(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1f}{spread}")
        lines.append([row_name(mode, degrees), *cells])
    return _aligned(lines)


def published_table(rows: Sequence[tuple[str, float]]) -> str:
    """The published rows of ImageNet for these (mode, degrees)."""
    known = {(mode, degrees if mode not in ("nocrop", "standard") else 0.0) for mode, degrees in rows}
    lines = [["published, ImageNet", *HEADS]]
    lines += [
        [row_name(mode, degrees), *(f"{value:.1f}" for value in values)]
        for (mode, degrees), values in PUBLISHED.items()
        if (mode, degrees) in known
    ]
    return _aligned(lines)


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width for width in widths[:1]] + ["-" * (width - 1) + ":" for width in widths[1:]]

    def row(cells: list[str]) -> str:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return "| " + " | ".join([first, *rest]) + " |"

    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])])
