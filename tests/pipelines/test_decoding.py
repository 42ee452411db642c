"""Files are decoded in child processes as in training: what breaks the decoder becomes a finding."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_spatial.pipelines.digits import export_digits
from fast_spatial.pipelines.inspection import decoding
from fast_spatial.pipelines.inspection.decoding import (
    FILES_PER_BATCH,
    MEMORY_BYTES,
    _Child,
    decode_files,
    inspect_files,
)
from fast_spatial.pipelines.inspection.findings import MAX_PIXELS
from tests.helpers.nasty_images import jpeg, with_size

# A decoder that crashes, hangs or leaves on files of certain names.
HOSTILE = """
import ctypes, os, signal
from fast_spatial.pipelines.inspection import decoding

def read(path, regular=decoding.read_regular):
    name = os.path.basename(path)
    if name == "crash.jpg":
        ctypes.string_at(0)
    if name == "hang.jpg":
        left_sec, _ = signal.getitimer(signal.ITIMER_REAL)
        if 0 < left_sec <= 50:
            signal.setitimer(signal.ITIMER_REAL, 0.1)  # the alarm comes sooner, not for the files before
            ctypes.PyDLL(None).pause()  # in C, without letting Python run
    if name == "leave.jpg":
        os._exit(3)
    return regular(path)

decoding.read_regular = read
"""
SERVE = "decoding._serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))"


@pytest.fixture(scope="module")
def digits():
    return [str(path) for path in sorted((export_digits() / "train").rglob("*.jpg"))]


@pytest.fixture
def hostile(monkeypatch):
    """The list of children; they run HOSTILE."""
    return run_instead(monkeypatch, HOSTILE + SERVE)


@pytest.fixture
def everything_is_large(monkeypatch):
    """The list of children; they treat every image as large."""
    return run_instead(
        monkeypatch,
        "from fast_spatial.pipelines.inspection import decoding\n"
        f"decoding._BATCH_PIXELS = decoding._LARGE_PIXELS = 1\n{SERVE}",
    )


def run_instead(monkeypatch, program: str) -> list[subprocess.Popen[bytes]]:
    """Replace the children's program; returns the list of started children."""
    children: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def popen(command, **options):
        assert command[1:3] == ["-m", "fast_spatial.pipelines.inspection.decoding"]
        children.append(start([command[0], "-c", f"import sys\n{program}", *command[3:]], **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    return children


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def link_to(image: str, *names: Path) -> list[str]:
    for name in names:
        name.symlink_to(image)
    return [str(name) for name in names]


def test_good_files_are_reported_once_each(digits):
    found = list(decode_files(digits[:300], processes=2))
    assert sorted(found) == [(path, None) for path in digits[:300]]


def test_no_file_at_all_starts_no_process(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert list(decode_files([])) == []


def test_bad_files_among_good_ones_are_named_with_their_reasons(digits, tmp_path):
    content = Path(digits[0]).read_bytes()
    bad = {
        "cut.jpg": (content[: len(content) // 2], "cannot be decoded: Premature end of JPEG data"),
        "empty.jpg": (b"", "cannot be decoded: empty file"),
        "text.jpg": (b"<html>404</html>", "cannot be decoded: format unknown to the decoder"),
    }
    for name, (data, _) in bad.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.jpg")
    names = [str(tmp_path / name) for name in (*bad, "pipe.jpg", "missing.jpg")]
    mixed = digits[:20] + names[:2] + digits[20:50] + names[2:] + digits[50:60]
    found = dict(decode_files(mixed))
    assert len(found) == len(mixed)
    assert {path for path, reason in found.items() if reason} == set(names)
    for name, (_, reason) in bad.items():
        assert (found[str(tmp_path / name)] or "").startswith(reason)
    assert found[str(tmp_path / "pipe.jpg")] == "not a regular file"
    assert found[str(tmp_path / "missing.jpg")] == "unreadable: No such file or directory"


def test_a_crash_a_hang_and_an_exit_are_pinned_to_their_files(digits, tmp_path, hostile):
    bad = link_to(digits[0], *(tmp_path / f"{name}.jpg" for name in ("crash", "hang", "leave")))
    mixed = digits[:10] + bad[:1] + digits[10:40] + bad[1:] + digits[40:70]
    found = dict(decode_files(mixed, processes=2, timeout_sec=50.0))
    assert len(found) == len(mixed)
    assert {path: reason for path, reason in found.items() if reason} == {
        bad[0]: "crashes the decoder (signal 11)",
        bad[1]: "the decoder does not finish",
        bad[2]: "crashes the decoder (exit status 3)",
    }
    # Two at the start; a file that kills does so once in its batch and once alone.
    assert 2 < len(hostile) <= 2 + 6
    assert all(child.returncode is not None for child in hostile)


def test_a_large_image_has_a_process_of_its_own(digits, everything_is_large):
    assert sorted(decode_files(digits[:4], processes=2)) == [(path, None) for path in digits[:4]]
    assert len(everything_is_large) == 4  # the first is also asked for all of them, and gives them back
    assert all(child.returncode is not None for child in everything_is_large)


@pytest.mark.slow
def test_the_largest_image_stays_within_a_childs_memory(tmp_path):
    side = int(MAX_PIXELS**0.5)
    path = tmp_path / "large.jpg"
    path.write_bytes(with_size(jpeg(subsampling=0, progressive=True), side, side))
    child = _Child(["1", "60"])
    try:
        child.ask([str(path)])
        assert child.answer() is None  # it has started
        (report,) = child.answer() or []
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{child._process.pid}/status").read_text())
    finally:
        child.end()
    assert [finding.kind for finding in report.findings] == ["damaged"]
    assert child.spent
    assert peak and (1 << 30) < int(peak[1]) << 10 < MEMORY_BYTES // 2


def test_a_decoder_that_does_not_start_is_no_verdict_on_files(digits, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the decoder does not start: its process ended with exit status 1"):
        list(decode_files(digits[:3]))


def test_an_iterator_that_is_left_early_leaves_no_process(digits):
    before = children_of(os.getpid())
    found = decode_files(digits, processes=2)
    next(found)
    (first, *_) = [pid for pid in children_of(os.getpid()) if pid not in before]
    found.close()
    assert children_of(os.getpid()) == before
    assert not Path(f"/proc/{first}").exists()


def test_paths_are_taken_as_they_are_needed(digits):
    taken = []

    def paths():
        for path in digits:
            taken.append(path)
            yield path

    found = decode_files(paths())
    next(found)
    assert len(taken) <= 2 * FILES_PER_BATCH
    found.close()


def test_children_end_with_a_parent_that_was_killed(digits, tmp_path):
    program = f"""
import time
from fast_spatial.pipelines.inspection.decoding import decode_files
for _ in decode_files({digits[:3]!r}):
    print("decoding", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"decoding\n"
        (child,) = children_of(parent.pid)
        parent.kill()
    give_up = time.monotonic() + 300
    while _alive(child) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_reaches_the_parent_alone(digits):
    found = decode_files(digits[:100])
    next(found)
    (child,) = (pid for pid in children_of(os.getpid()) if os.getpgid(pid) == pid)
    assert os.getpgid(child) != os.getpgid(0)
    assert len(list(found)) == 99


def test_the_same_content_has_the_same_digest(digits, tmp_path):
    (copy,) = link_to(digits[0], tmp_path / "copy.jpg")
    digests = {report.path: report.digest for report in inspect_files([digits[0], digits[1], copy])}
    assert len(digests[copy]) == 32
    assert digests[copy] == digests[digits[0]] != digests[digits[1]]


def test_the_alarm_that_ends_a_hang_has_its_default_action():
    assert decoding._HANG == -signal.SIGALRM
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
