"""Two thousand broken JPEG files: each has a result, nothing crashes or hangs, and memory stays bounded."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from fast_spatial.pipelines.inspection.decoding import Report, inspect_files
from tests.helpers.nasty_images import STARTS_OF_FRAME, encode, exif, jpeg, picture, with_size
from tests.pipelines.test_decoding import children_of
from tests.tools.test_check import training_survives

COUNT = 2000
MEMORY_MIB = 1000


def sources() -> list[bytes]:
    """Small JPEG files of all the usual variants."""
    return [
        jpeg(1),
        jpeg(2, progressive=True),
        jpeg(3, subsampling=0),
        jpeg(4, restart_marker_blocks=2),
        jpeg(5, exif=exif(6)),
        encode(picture(seed=6).convert("L"), "JPEG"),
        encode(picture(seed=7).convert("CMYK"), "JPEG"),
    ]


def mutant(seed: int, files: list[bytes]) -> bytes:
    """A file that is broken in one of many ways."""
    rng = np.random.default_rng(seed)
    content = bytearray(files[rng.integers(len(files))])
    where = int(rng.integers(2, len(content)))
    how = seed % 8
    if how in (0, 1):  # flipped bits, anywhere or in the header
        reach = len(content) if how == 0 else 700
        for _ in range(rng.integers(1, 20)):
            content[rng.integers(2, min(reach, len(content)))] ^= 1 << rng.integers(8)
    elif how == 2:
        del content[where:]
    elif how == 3:  # the head of one, the tail of another
        other = files[rng.integers(len(files))]
        content[where:] = other[rng.integers(len(other)) :]
    elif how == 4:
        del content[where : where + rng.integers(1, 200)]
    elif how == 5:
        content[where:where] = rng.bytes(int(rng.integers(1, 200)))
    elif how == 6:  # another marker
        content[where : where + 2] = bytes([0xFF, rng.integers(0xC0, 0xFF)])
    elif any(marker in content for marker in STARTS_OF_FRAME):
        content = bytearray(with_size(bytes(content), *map(int, 2 ** rng.uniform(0, 13, 2))))
    else:
        content[where : where + 500] = bytes(500)
    return bytes(content)


def write_mutants(folder: Path, count: int) -> list[str]:
    """Write broken files; returns their paths."""
    files = sources()
    paths = [folder / f"{seed:05}.jpg" for seed in range(count)]
    for seed, path in enumerate(paths):
        path.write_bytes(mutant(seed, files))
    return [str(path) for path in paths]


def peaks_mib() -> list[int]:
    """The peak memory of each child of this process."""
    found = []
    for pid in children_of(os.getpid()):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        found += [int(match[1]) // 1024] if match else []
    return found


def test_every_broken_file_has_a_verdict_that_training_shares(tmp_path):
    paths = write_mutants(tmp_path, COUNT)
    reports: dict[str, Report] = {}
    peak = 0
    for number, report in enumerate(inspect_files(paths, processes=2), 1):
        assert report.path not in reports
        reports[report.path] = report
        if number % 100 == 0:
            peak = max(peak, *peaks_mib())
    assert len(reports) == COUNT
    assert 100 < peak < MEMORY_MIB

    kinds = Counter(finding.kind for report in reports.values() for finding in report.findings)
    assert not {"crash", "hang"} & kinds.keys()
    assert all(kinds[kind] > 50 for kind in ("damaged", "truncated", "undecodable", "not_an_image"))
    assert sum(not report.findings for report in reports.values()) > 50

    # Of the last ones, whose sizes are those of the originals, as training decodes all of an image only then.
    sample = [Path(path) for path in sorted(reports)[-400:] if int(Path(path).stem) % 8 != 7]
    good = [path for path in sample if not reports[str(path)].problem]
    bad = [path for path in sample if reports[str(path)].problem]
    assert len(good) > 100
    assert training_survives(good)
    assert [path.name for path in bad[:40] if training_survives([path])] == []
