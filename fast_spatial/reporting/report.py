"""The report of runs: the page, and its Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fast_spatial.reporting import sections
from fast_spatial.reporting.document import to_html, to_markdown
from fast_spatial.reporting.runs import find_budgets, find_runs, rows_of
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
    title, content = sections.title(rows), sections.sections(rows, find_budgets(folders), price)
    texts = {REPORT: to_html(title, content), REPORT_MARKDOWN: to_markdown(title, content)}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        encoded = text.encode()
        write_atomically(out / name, lambda file: file.write(encoded))  # noqa: B023  (called at once)
    say(f"written to {out / REPORT} and {REPORT_MARKDOWN}")
