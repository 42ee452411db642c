"""Checking a data folder: every file is decoded as training decodes it; what would end a run or change its result."""

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

_HEADINGS = {KILLS: "Ends a run", CHANGES: "Changes a result", NOTE: "Harmless"}
# A part of the memory's name, as the decoder is: what other rules found is not remembered.
_RULES = 1
_SHOWN = 3
_WRITE_EVERY_SEC = 1.0


@dataclass
class Findings:
    """What was found so far, by path relative to the data folder, and what val/ holds, by its content's hash."""

    data: Path
    found: list[tuple[str, Finding]] = field(default_factory=list)
    remembered: int = 0
    val_images: dict[str, str] = field(default_factory=dict)

    def add(self, path: str, *findings: Finding) -> None:
        """Take what was found about a path."""
        self.found += [(path.removeprefix(f"{self.data}/"), finding) for finding in findings]

    def add_report(self, report: Report) -> None:
        """Take a file's report; those of val/ come before those of train/, where duplicates are looked for."""
        self.remembered += report.remembered
        self.add(report.path, *report.findings)
        if report.problem or not report.digest:
            return
        if report.path.startswith(f"{self.data}/val/"):
            self.val_images.setdefault(report.digest, report.path.removeprefix(f"{self.data}/"))
        elif report.digest in self.val_images:
            self.add(report.path, Finding("duplicate", f"it is {printable(self.val_images[report.digest])}"))


class FindingsCache:
    """What was found about files whose size and time of change are still the same, in a database in the cache folder.

    What does not lie in the content alone (crashes, unreadable files) is not remembered.
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
        """The report of an earlier check, if the file has not changed since."""
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
        """Remember a report, written within a second or so."""
        if report.digest and not report.remembered:
            row = (report.size, report.mtime_ns, report.digest, json.dumps(report.findings))
            self._new.append((os.fsencode(report.path), *row))
        if time.monotonic() > self._written + _WRITE_EVERY_SEC:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        self._write()
        self._database.close()

    def _write(self) -> None:
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", self._new)
        self._new = []
        self._written = time.monotonic()


def check_data(config: CheckConfig) -> int:
    """Check a folder, print and write what was found; returns the exit status: 1, or 0 if all is harmless."""
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
    say(f"{data}: {images} images to decode, in {processes} processes")

    memory_file = cache_folder() / f"check-{_RULES}-{decoder}.sqlite"
    try:
        with closing(FindingsCache(memory_file)) as memory:
            reports = _reports(data, splits, processes=processes, remembered=memory.find)
            with closing(reports):
                for report in Bar(reports, total=images, images_per_batch=1, title="check", show=True):
                    memory.add(report)
                    findings.add_report(report)
    except KeyboardInterrupt:
        say("stopped: the same command continues where this one was")
        raise
    except sqlite3.Error as error:
        raise UserError(f"{memory_file}, where verdicts are kept, cannot be used: {error}", "remove it") from None

    findings.found.sort()
    say(summary_text(findings.found))
    seconds = time.monotonic() - start
    say(f"{images} images in {seconds:.0f} s, {findings.remembered} of them remembered from an earlier check")
    if config.json:
        write_json(Path(config.json), report_of(config, decoder, splits, findings.found))
        say(f"the report is in {config.json}")
    _exclude(config.write_exclusions, exclusions(findings.found))
    return int(any(KINDS[finding.kind].severity != NOTE for _, finding in findings.found))


def _exclude(listing: str, out: dict[str, Finding]) -> None:
    """Write the images to leave out, if there is a file for that, or tell that it can be done."""
    for path in [path for path in out if "\n" in path or "\r" in path]:
        say(f"{printable(path)} cannot be excluded: its name has a line break; rename or remove it")
        del out[path]
    if listing:
        write_exclusions(Path(listing), out)
        say(f"{len(out)} images are listed in {listing}: give it to train and evaluate as --exclude")
    elif out:
        say(f"--write-exclusions FILE lists {len(out)} images here that train and evaluate can --exclude")


def _reports(data: Path, splits: dict[str, Survey], **options: Any) -> Generator[Report, None, None]:
    """The files' reports, all of a split's before the next's."""
    for split, found in splits.items():
        yield from inspect_files(images_of(data, split, found.classes), **options)


def summary_text(found: list[tuple[str, Finding]]) -> str:
    """What was found, for people: by severity and kind, the first few of each."""
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
    return "\n".join(lines or ["nothing was found: every image decodes"])


def report_of(
    config: CheckConfig, decoder: str, splits: dict[str, Survey], found: list[tuple[str, Finding]]
) -> dict[str, Any]:
    """What `--json` writes."""
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
    """The images to leave out, with the reason: those that end a run, and the copies in train/ of what is in val/."""
    return {path: finding for path, finding in found if KINDS[finding.kind].exclude}


def write_exclusions(listing: Path, out: dict[str, Finding]) -> None:
    """Write an exclusion file: a comment with the reason, and the path, for every image."""
    lines = ["# Images to leave out, relative to the data folder: train and evaluate take this file as --exclude."]
    for path, finding in out.items():
        lines += [f"# {finding.kind}: {finding.detail}", path]
    text = "\n".join(lines) + "\n"
    listing.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(listing, lambda file: file.write(text.encode("utf-8", "surrogateescape")))
