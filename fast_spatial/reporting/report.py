"""The report of runs, as a page and as Markdown: sections in the order of a reader's questions.

All numbers come from the files of the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fast_spatial.reporting import accuracy, cost, landscapes, provenance, robustness
from fast_spatial.reporting.document import Section, to_html, to_markdown
from fast_spatial.reporting.learning import learning
from fast_spatial.reporting.runs import Row, Spent, find_budgets, find_runs, rows_of
from fast_spatial.runtime.files import write_atomically
from fast_spatial.runtime.run_files import REPORT, REPORT_MARKDOWN
from fast_spatial.runtime.runlog import say


def write_report(folders: Sequence[Path], out: Path, price: float = 0.0) -> None:
    """Write report.html and report.md of the runs in these folders.

    Args:
        folders: output folders of `train` or `reproduce`.
        out: the folder for the report; created.
        price: price of a GPU-hour; 0: unknown.

    Raises:
        UserError: if a folder contains no run.
        OSError: if the report cannot be written.

    """
    rows = rows_of(find_runs(folders))
    title, content = title_of(rows), sections_of(rows, find_budgets(folders), price)
    texts = {REPORT: to_html(title, content), REPORT_MARKDOWN: to_markdown(title, content)}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        encoded = text.encode()
        write_atomically(out / name, lambda file: file.write(encoded))  # noqa: B023  (called at once)
    say(f"written to {out / REPORT} and {REPORT_MARKDOWN}")


def sections_of(rows: Sequence[Row], budgets: Sequence[Spent], price: float) -> list[Section]:
    """All sections; `price` is the price of a GPU-hour, 0 if unknown."""
    return [
        Section("Results", accuracy.results(rows)),
        Section("Cost", cost.cost(rows, price)),
        *([Section("Budget", cost.spent(rows, budgets))] if budgets else []),
        Section("Learning curves", learning(rows)),
        Section("Robustness", robustness.curves(rows)),
        Section("Landscape", landscapes.landscapes(rows)),
        Section("Worst views", landscapes.worst_views(rows)),
        Section("Classes", accuracy.classes(rows)),
        Section("Deviations from the reference", provenance.deviating(rows)),
        Section("How to repeat it", provenance.repeating(rows)),
    ]


def title_of(rows: Sequence[Row]) -> str:
    """The title: number of models, and their data."""
    data = ", ".join(sorted({run.data for row in rows for run in row.runs}))
    models = sum(len(row.runs) for row in rows)
    return f"Rotations and translations: {models} {'model' if models == 1 else 'models'} on {data}"
