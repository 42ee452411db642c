"""The report of runs: the page, its Markdown, and the small tables of a reproduction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fast_spatial.config import PUBLISHED
from fast_spatial.files import write_atomically
from fast_spatial.reporting.document import DASH, aligned, to_html, to_markdown
from fast_spatial.runlog import say

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
            values = [run[f"{attack}_top1_pct"] for run in runs if run[f"{attack}_top1_pct"] is not None]
            spread = f" ±{(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.1f}{spread}" if values else DASH)
        lines.append([row_name(mode, degrees), *cells])
    return aligned(lines)


def grid_images(judged: dict[str, Any]) -> int:
    """How many images met the grid: of an evaluation's summary, or a reproduction's result; all, unless it says so."""
    return int(judged.get("grid_num_images", judged["num_images"]))


def grid_note(judged: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """A sentence on rows whose grid met fewer images than the other attacks; "" if there are none.

    Args:
        judged: the name of the row and the summary, or result, of every run.

    """
    few = dict.fromkeys(
        f"{_count(grid_images(found))} of {found['num_images']:,} ({name})"
        for name, found in judged
        if grid_images(found) < found["num_images"]
    )
    return f"The grid met fewer images than the other attacks: {', '.join(few)}." if few else ""


def _count(images: int) -> str:
    return f"{images:,}" if images else "none"


def published_table(rows: Sequence[tuple[str, float]]) -> str:
    """The published rows of ImageNet for these (mode, degrees)."""
    known = {(mode, degrees if mode not in ("nocrop", "standard") else 0.0) for mode, degrees in rows}
    lines = [["published, ImageNet", *HEADS]]
    lines += [
        [row_name(mode, degrees), *(f"{value:.1f}" for value in values)]
        for (mode, degrees), values in PUBLISHED.items()
        if (mode, degrees) in known
    ]
    return aligned(lines)


def write_report(folders: Sequence[Path], out: Path, price: float = 0.0) -> None:
    """Write report.html and report.md of the runs in these folders.

    Args:
        folders: of `train` or `reproduce`.
        out: where to; created.
        price: of a GPU-hour; 0: not told.

    Raises:
        ValueError: if a folder holds no run, or the report cannot be written.

    """
    from fast_spatial.reporting import sections  # imports torch
    from fast_spatial.reporting.runs import find_budgets, find_runs, rows_of

    rows = rows_of(find_runs(folders))
    title, content = sections.title(rows), sections.sections(rows, find_budgets(folders), price)
    texts = {"report.html": to_html(title, content), "report.md": to_markdown(title, content)}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        encoded = text.encode()
        write_atomically(out / name, lambda file: file.write(encoded))  # noqa: B023  (called at once)
    say(f"written to {out / 'report.html'} and report.md")
