"""`launch.py check-data`: decode every file as training does, and list what would end a run or change its result."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nvidia.dali

from fast_spatial.config.commands import CheckConfig
from fast_spatial.config.fields import to_json
from fast_spatial.data.images import data_folder
from fast_spatial.errors import UserError
from fast_spatial.kernels.host import cache_folder, usable_cpus
from fast_spatial.pipelines.inspection.decoding import Report, inspect_files
from fast_spatial.pipelines.inspection.findings import (
    CHANGES,
    KILLS,
    KINDS,
    NOTE,
    Finding,
    Survey,
    compare_classes,
    images_of,
    survey,
)
from fast_spatial.pipelines.text import printable
from fast_spatial.runtime.files import write_atomically, write_json
from fast_spatial.runtime.runlog import Bar, say
from fast_spatial.runtime.text import duration

_HEADINGS = {KILLS: "Ends a run", CHANGES: "Changes a result", NOTE: "Harmless"}
# Part of the cache's file name, as the decoder is: a change of the rules invalidates cached findings.
_RULES = 2
_SHOWN = 3
_WRITE_EVERY_SEC = 1.0


@dataclass
class Findings:
    """Findings so far, by path relative to the data folder, and the images of val/ by the hash of their content."""

    data: Path
    found: list[tuple[str, Finding]] = field(default_factory=list)
    remembered: int = 0
    val_images: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, *findings: Finding) -> None:
        """Add the findings of a path."""
        self.found += [(path.removeprefix(f"{self.data}/"), finding) for finding in findings]

    def add_report(self, report: Report) -> None:
        """Add a file's report. Reports of val/ must come before those of train/, to find duplicates."""
        self.remembered += report.remembered
        self.add(report.path, *report.findings)
        if report.problem or not report.digest:
            return
        if report.path.startswith(f"{self.data}/val/"):
            self.val_images.setdefault(report.digest, report.path.removeprefix(f"{self.data}/"))
        elif report.digest in self.val_images:
            self.add(report.path, Finding("duplicate", f"identical to {printable(self.val_images[report.digest])}"))


class FindingsCache:
    """Cached reports of files, in a SQLite database; valid while a file's size and modification time are unchanged.

    Findings that depend on more than the content (crashes, unreadable files) are not cached.
    """

    def __init__(self, file: Path) -> None:
        self._database = sqlite3.connect(file, timeout=60)
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, size INTEGER, mtime_ns INTEGER, digest TEXT, "
            "findings TEXT) WITHOUT ROWID"
        )
        self._new: list[tuple[Any, ...]] = []
        self._written = time.monotonic()

    def find(self, path: str) -> Report | None:
        """The cached report of a path; None if there is none, or the file has changed since."""
        row = self._database.execute(
            "SELECT size, mtime_ns, digest, findings FROM files WHERE path = ?", (os.fsencode(path),)
        ).fetchone()
        if row is None:
            return None
        size, mtime_ns, digest, findings = row
        try:
            now = os.stat(path)
        except OSError:
            return None
        if (now.st_size, now.st_mtime_ns) != (size, mtime_ns):
            return None
        return Report(path, [Finding(*pair) for pair in json.loads(findings)], digest, size, mtime_ns, remembered=True)

    def add(self, report: Report) -> None:
        """Cache a report; it is written to disk within about a second."""
        if report.digest and not report.remembered:
            row = (report.size, report.mtime_ns, report.digest, json.dumps(report.findings))
            self._new.append((os.fsencode(report.path), *row))
        if time.monotonic() > self._written + _WRITE_EVERY_SEC:
            self._write()

    def close(self) -> None:
        """Write pending reports and close the database."""
        self._write()
        self._database.close()

    def _write(self) -> None:
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", self._new)
        self._new = []
        self._written = time.monotonic()


def check_data(config: CheckConfig) -> int:
    """Check a folder, print and write the findings. Returns the exit status: 0 if all are harmless, else 1."""
    start = time.monotonic()
    data = data_folder(config.data).absolute()
    processes = config.workers or usable_cpus()
    decoder = f"dali-{nvidia.dali.__version__}-cpu"
    findings = Findings(data)
    splits = {split: survey(data, split) for split in sorted(config.splits, reverse=True)}  # val first
    about_folders = [found for split in splits.values() for found in split.findings]
    if all(split.classes for split in splits.values()) and len(splits) == 2:
        about_folders += compare_classes(data, splits["train"].classes, splits["val"].classes)
    for path, finding in about_folders:
        findings.add(path, finding)
    images = sum(split.images for split in splits.values())
    say(f"{data}: decoding {images} images in {processes} processes")

    memory_file = cache_folder() / f"check-{_RULES}-{decoder}.sqlite"
    try:
        with closing(FindingsCache(memory_file)) as memory:
            reports = _reports(data, splits, processes=processes, remembered=memory.find)
            with closing(reports):
                for report in Bar(reports, total=images, images_per_batch=1, title="check", show=True):
                    memory.add(report)
                    findings.add_report(report)
    except KeyboardInterrupt:
        say("stopped: run the same command again to continue")
        raise
    except sqlite3.Error as error:
        raise UserError(f"the cache of findings {memory_file} cannot be used: {error}", "remove the file") from None

    findings.found.sort()
    say(summary_text(findings.found))
    seconds = time.monotonic() - start
    say(f"{images} images in {duration(seconds)}; {findings.remembered} reused from an earlier check")
    if config.json:
        write_json(Path(config.json), report_of(config, decoder, splits, findings.found))
        say(f"report: {config.json}")
    _exclude(config.write_exclusions, exclusions(findings.found))
    return int(any(KINDS[finding.kind].severity != NOTE for _, finding in findings.found))


def _exclude(listing: str, out: dict[str, Finding]) -> None:
    """Write the exclusion file if one was requested; otherwise log that it can be written."""
    for path in [path for path in out if "\n" in path or "\r" in path]:
        say(f"{printable(path)} cannot be excluded: its name contains a line break. Rename or remove it")
        del out[path]
    if listing:
        write_exclusions(Path(listing), out)
        say(f"{len(out)} images listed in {listing}: use train and evaluate with --exclude {listing}")
    elif out:
        say(f"{len(out)} images can be excluded: write a list with --write-exclusions FILE, use it as --exclude FILE")


def _reports(data: Path, splits: dict[str, Survey], **options: Any) -> Generator[Report, None, None]:
    """The files' reports, split by split."""
    for split, found in splits.items():
        yield from inspect_files(images_of(data, split, found.classes), **options)


def summary_text(found: list[tuple[str, Finding]]) -> str:
    """The findings as text, by severity and kind, with the first few paths of each."""
    by_kind: dict[str, list[tuple[str, Finding]]] = defaultdict(list)
    for path, finding in found:
        by_kind[finding.kind].append((path, finding))
    lines = []
    for severity, heading in _HEADINGS.items():
        kinds = [kind for kind in KINDS if kind in by_kind and KINDS[kind].severity == severity]
        lines += [f"{heading}:"] if kinds else []
        for kind in kinds:
            these = by_kind[kind]
            lines.append(f"  {len(these)} {kind.replace('_', ' ')}: {KINDS[kind].advice}")
            lines += [f"    {printable(path)}: {finding.detail}" for path, finding in these[:_SHOWN]]
            lines += [f"    and {len(these) - _SHOWN} more"] if len(these) > _SHOWN else []
    return "\n".join(lines or ["no findings: every image decodes"])


def report_of(
    config: CheckConfig, decoder: str, splits: dict[str, Survey], found: list[tuple[str, Finding]]
) -> dict[str, Any]:
    """The content of the `--json` file."""
    counts: dict[str, int] = defaultdict(int)
    for _, finding in found:
        counts[finding.kind] += 1
    return {
        "config": to_json(config),
        "decoder": decoder,
        "splits": {name: {"classes": len(s.classes), "images": s.images} for name, s in splits.items()},
        "counts": counts,
        "findings": [
            {"path": path, "kind": finding.kind, "severity": KINDS[finding.kind].severity, "detail": finding.detail}
            for path, finding in found
        ],
    }


def exclusions(found: list[tuple[str, Finding]]) -> dict[str, Finding]:
    """Images to exclude, by path: those that end a run, and images of train/ that are also in val/."""
    return {path: finding for path, finding in found if KINDS[finding.kind].exclude}


def write_exclusions(listing: Path, out: dict[str, Finding]) -> None:
    """Write an exclusion file: for every image, a comment with the reason and a line with the path."""
    lines = ["# Images to exclude, relative to the data folder. Use: train or evaluate with --exclude and this file."]
    for path, finding in out.items():
        lines += [f"# {finding.kind}: {finding.detail}", path]
    text = "\n".join(lines) + "\n"
    listing.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(listing, lambda file: file.write(text.encode("utf-8", "surrogateescape")))
