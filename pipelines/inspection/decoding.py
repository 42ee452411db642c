"""Decode files on CPUs in child processes, so that a file that breaks the decoder becomes a finding.

Only the CPU decoder counts, because a GPU decoder may fail on a good file: training decodes on CPUs what a GPU fails
on.

A file that DALI cannot decode ends its pipeline, with an error that does not name the file. It may also crash the
process or keep it busy for ever. So child processes decode in batches. If a batch fails, the child decodes it file by
file, on new pipelines (2 ms each). If a child dies, a new one decodes its batch file by file. Children inherit only the
environment, and end with their parent.

    python -m fast_spatial.pipelines.inspection.decoding DESCRIPTOR THREADS TIMEOUT_SEC
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import fn, pipeline_def
from PIL import Image

from fast_spatial.kernels.host import environment_of_children, usable_cpus
from fast_spatial.pipelines.inspection.findings import (
    KILLS,
    KINDS,
    MAX_PIXELS,
    Content,
    Finding,
    explain_failure,
    inspect_header,
    read_regular,
)
from fast_spatial.pipelines.ops import decode_box
from fast_spatial.pipelines.placement import Decoding

TIMEOUT_SEC = 60.0
FILES_PER_BATCH = 32
# Memory limit of a child: the largest image (`findings.MAX_PIXELS`), with a margin.
MEMORY_BYTES = 6 << 30
# Largest sum of files, and of decoded pixels, that is decoded as one batch.
_BATCH_BYTES, _BATCH_PIXELS = 1 << 26, 1 << 24
# A larger image is decoded in its own process, since DALI does not return memory.
_LARGE_PIXELS = 1 << 26
_ALONE = Finding("alone", "")  # tells the parent to send this file alone
_START_SEC = 600.0
# Death by the kernel's timer, which also ends an endless loop in the decoder.
_HANG = -signal.SIGALRM
_COMPLAINT = re.compile(r"corrupt|premature|extraneous|unsupported|invalid|error|bad", re.IGNORECASE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(r"^(\[\w+\] )*(Could not [\w ]+ stream - )?")
_STATUS = {
    "nvImageCodec failure: '#3'": "damaged header",
    "nvImageCodec failure: '#4'": "format unknown to the decoder",
}


class Report(NamedTuple):
    """Findings of a file; `remembered` if they come from an earlier check.

    `digest` (hash of the content), `size` (bytes) and `mtime_ns` are set only if the findings follow from the content.
    """

    path: str
    findings: list[Finding]
    digest: str = ""
    size: int = 0
    mtime_ns: int = 0
    remembered: bool = False

    @property
    def problem(self) -> str | None:
        """Why this file would end a run, or None."""
        return next((found.detail for found in self.findings if KINDS[found.kind].severity == KILLS), None)


def decode_files(
    paths: Iterable[str], *, processes: int = 1, timeout_sec: float = TIMEOUT_SEC
) -> Generator[tuple[str, str | None], None, None]:
    """Whether files can be decoded: (path, None) or (path, reason), each path once, in any order.

    Args:
        paths: the files; consumed lazily.
        processes: number of child processes; they end when the iterator ends or is closed.
        timeout_sec: a file that takes longer counts as a hang of the decoder.

    Raises:
        RuntimeError: if the decoder does not start.

    """
    for report in inspect_files(paths, processes=processes, timeout_sec=timeout_sec):
        yield report.path, report.problem


def inspect_files(
    paths: Iterable[str],
    *,
    processes: int = 1,
    timeout_sec: float = TIMEOUT_SEC,
    remembered: Callable[[str], Report | None] = lambda path: None,
) -> Generator[Report, None, None]:
    """All findings of files, as `decode_files`. Files for which `remembered` returns a report are not opened."""
    threads = max(1, usable_cpus() // processes)
    words = [str(threads), str(timeout_sec)]
    queue = iter(paths)
    alone: list[str] = []  # large files, and files of batches in which a child died
    idle: list[_Child] = []
    busy: dict[Connection, _Child] = {}
    try:
        while True:
            while len(busy) < processes:
                if alone:
                    batch = [alone.pop()]
                else:
                    batch = []
                    for path in queue:
                        report = remembered(path)
                        if report is None:
                            batch.append(path)
                        else:
                            yield report
                        if len(batch) == FILES_PER_BATCH:
                            break
                if not batch:
                    break
                child = idle.pop() if idle else _Child(words)
                busy[child.connection] = child
                child.ask(batch)
            if not busy:
                return
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                child = busy[ready]
                reports = child.answer()
                if reports is None:
                    continue
                del busy[ready]
                if child.spent:
                    child.end()
                else:
                    idle.append(child)
                for report in reports:
                    if report.findings == [_ALONE]:
                        alone.append(report.path)
                    else:
                        yield report
    finally:
        for child in [*idle, *busy.values()]:
            child.end()


def _death(status: int) -> Finding:
    if status == _HANG:
        return Finding("hang", "the decoder does not finish")
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return Finding("crash", f"crashes the decoder ({how})")


class _Child:
    """A child process that inspects a batch of files at a time."""

    def __init__(self, words: list[str]) -> None:
        self.connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fast_spatial.pipelines.inspection.decoding", str(theirs.fileno()), *words],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,  # Ctrl-C reaches the parent alone, which then ends its children
            env=environment_of_children(),
        )
        theirs.close()
        self.batch: list[str] = []
        self.started = False
        self.spent = False

    def ask(self, batch: list[str]) -> None:
        self.batch = batch
        with suppress(ConnectionError):  # it died; `answer` reports that
            self.connection.send_bytes(json.dumps(batch).encode())

    def answer(self) -> list[Report] | None:
        """The batch's reports; None for the first message, which says that the child has started.

        Raises:
            RuntimeError: if the child died before it started.

        """
        try:
            word = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            self.spent = True
            status = self.end()
            if not self.started:
                raise RuntimeError(f"the decoder does not start: its process ended with exit status {status}") from None
            found = _death(status) if len(self.batch) == 1 else _ALONE
            return [Report(path, [found]) for path in self.batch]
        if not self.started:
            self.started = True
            return None
        reports, self.spent = word
        return [Report(path, [Finding(*pair) for pair in findings], *about) for path, findings, *about in reports]

    def end(self) -> int:
        """Kill the child if it is alive; returns its exit status."""
        self.connection.close()
        self._process.kill()
        return self._process.wait()


# --- in the child


@pipeline_def
def _shape_graph() -> Any:
    return fn.peek_image_shape(fn.external_source(name="encoded"), adjust_orientation=False)


@pipeline_def
def image_graph() -> Any:
    """Decode whole images with training's operator on CPUs: uint8 [H, W, 3].

    Inputs: `encoded` files and their `size`, int32 [2] of height and width.
    """
    encoded, size = fn.external_source(name="encoded"), fn.external_source(name="size")
    return decode_box(encoded, np.zeros(2, np.int32), size, Decoding("cpu"))


class _Decoder:
    """Decodes whole images with training's operator, and reports why an image cannot be decoded."""

    def __init__(self, *, threads: int) -> None:
        self._threads = threads
        self._stderr = os.memfd_create("complaints")
        for descriptor in (1, 2):
            os.dup2(self._stderr, descriptor)
        sample = io.BytesIO()
        Image.new("RGB", (16, 16)).save(sample, "JPEG")
        self._sample = sample.getvalue()
        self.spent = False
        self._build()

    def inspect(self, contents: list[bytes], *, alone: bool) -> list[Finding | None]:
        """The finding of each content: why it cannot be decoded, a warning of the decoder, or None.

        `alone`: the batch is a single file, so it may be large. A large image marks this process as spent.
        """
        if len(contents) > 1 and all(contents):
            try:
                sizes = self._peek(contents)
                if sizes.prod(axis=1).sum() <= _BATCH_PIXELS:
                    self._decode(contents, sizes)
                    if not self._complaint():
                        return [None] * len(contents)
            except RuntimeError:
                self._build()
        return [self._inspect_one(content, alone) for content in contents]

    def _inspect_one(self, content: bytes, alone: bool) -> Finding | None:
        if not content:
            return explain_failure(content, "")
        try:
            sizes = self._peek([content])
            pixels = int(sizes.prod())
            if pixels > MAX_PIXELS:
                return Finding("too_large", f"{sizes[0, 1]} x {sizes[0, 0]} pixels in its header")
            if pixels > _LARGE_PIXELS:
                if not alone:
                    return _ALONE
                self.spent = True
            self._decode([content], sizes)
        except RuntimeError as error:
            reason = self._complaint() or reason_of(error)
            self._build()
            return explain_failure(content, reason)
        complaint = self._complaint()
        return Finding("damaged", complaint) if complaint else None

    def _build(self) -> None:
        """Build new pipelines and test them on a sample."""
        options = {
            "batch_size": FILES_PER_BATCH,
            "num_threads": self._threads,
            "device_id": None,
            "prefetch_queue_depth": 1,
            "exec_async": False,
            "exec_pipelined": False,
        }
        self._shapes: Any = _shape_graph(**options)
        self._images: Any = image_graph(**options)
        self._decode([self._sample], self._peek([self._sample]))
        self._complaint()

    def _peek(self, contents: list[bytes]) -> Any:
        """(height, width) of each content, int64 [N, 2], as the decoder reads them from the headers."""
        (shapes,) = self._shapes.run(encoded=[np.frombuffer(content, np.uint8) for content in contents])
        return np.stack([np.array(shapes[k])[:2] for k in range(len(contents))]).astype(np.int64)

    def _decode(self, contents: list[bytes], sizes: Any) -> None:
        encoded = [np.frombuffer(content, np.uint8) for content in contents]
        self._images.run(encoded=encoded, size=list(sizes.astype(np.int32)))

    def _complaint(self) -> str:
        """The first warning that the decoder printed since the last call; "" if none."""
        os.lseek(self._stderr, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self._stderr), "rb") as file:
            lines = _COLOURS.sub("", file.read(1 << 16).decode(errors="replace")).splitlines()
        os.ftruncate(self._stderr, 0)
        os.lseek(self._stderr, 0, os.SEEK_SET)
        return next((_PREFIX.sub("", line) for line in lines if _COMPLAINT.search(line)), "")


def reason_of(error: RuntimeError) -> str:
    """The cause in a DALI error, on one line."""
    found = re.search(r"encountered:\s*(.*?)\s*(Current pipeline|$)", str(error), re.DOTALL)
    reason = (found[1] if found else str(error)).strip().splitlines()[0]
    return _STATUS.get(reason, reason)


def _inspect_batch(decoder: _Decoder, paths: list[str]) -> list[Report]:
    reports: list[Report] = []
    contents: list[Content | Finding] = []
    for number, path in enumerate(paths, 1):
        contents.append(read_regular(path))
        encoded = [content.data for content in contents if isinstance(content, Content)]
        if number == len(paths) or sum(map(len, encoded)) > _BATCH_BYTES:
            decoded = iter(decoder.inspect(encoded, alone=len(paths) == 1))
            reports += [
                Report(where, [content]) if isinstance(content, Finding) else _report(where, content, next(decoded))
                for where, content in zip(paths[len(reports) : number], contents)
            ]
            contents = []
    return reports


def _report(path: str, content: Content, decoded: Finding | None) -> Report:
    findings = [decoded] if decoded else []
    if decoded is not _ALONE and (not decoded or KINDS[decoded.kind].severity != KILLS):
        findings += inspect_header(path, content.data)
    digest = hashlib.sha256(content.data).hexdigest()[:32]
    return Report(path, findings, digest, len(content.data), content.mtime_ns)


def _serve(descriptor: int, threads: int, timeout_sec: float) -> None:
    """Answer batches of paths until the parent closes the connection."""
    signal.setitimer(signal.ITIMER_REAL, _START_SEC)
    with suppress(OSError):  # if memory runs out, the kernel should kill this process first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    connection = Connection(descriptor)
    decoder = _Decoder(threads=threads)
    connection.send_bytes(b'"started"')
    with suppress(EOFError, ConnectionError):
        while True:
            signal.setitimer(signal.ITIMER_REAL, 0)
            paths = json.loads(connection.recv_bytes())
            signal.setitimer(signal.ITIMER_REAL, timeout_sec)
            reports = _inspect_batch(decoder, paths)
            connection.send_bytes(json.dumps([reports, decoder.spent]).encode())
            if decoder.spent:
                return


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
