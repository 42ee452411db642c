"""Decoding files on CPUs in child processes, so that a file that breaks the decoder is a verdict.

A GPU decoder may fail on a good file, so it has no say: training decodes on CPUs what a GPU fails on.

A file that DALI cannot decode ends its pipeline for good, with an error that does not name it; a worse one may crash
the process, or keep it busy for ever. Here, every child decodes batches; a batch that fails is taken apart, file by
file, on a pipeline built anew, which takes 2 ms; a child that dies is replaced, and its batch asked for file by file.
Children inherit nothing but the environment, and end with their parent.

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
# A child's memory, on a CPU: what the largest image takes (`audit.MAX_PIXELS`), and some.
MEMORY_BYTES = 6 << 30
# Files are decoded together up to so much of them.
_BATCH_BYTES, _BATCH_PIXELS = 1 << 26, 1 << 24
# A larger image has a process of its own, since DALI gives no memory back.
_LARGE_PIXELS = 1 << 26
_ALONE = Finding("alone", "")  # to the parent: ask again for this file alone
_START_SEC = 600.0
# Exit by the kernel's alarm clock, which no loop in the decoder can put off.
_HANG = -signal.SIGALRM
_COMPLAINT = re.compile(r"corrupt|premature|extraneous|unsupported|invalid|error|bad", re.IGNORECASE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(r"^(\[\w+\] )*(Could not [\w ]+ stream - )?")
_STATUS = {
    "nvImageCodec failure: '#3'": "its header is damaged",
    "nvImageCodec failure: '#4'": "its format is unknown to the decoder",
}


class Report(NamedTuple):
    """What was found about a file, now or (`remembered`) earlier.

    If its content decided, with the content's hash and size and the time of its last change (nanoseconds).
    """

    path: str
    findings: list[Finding]
    digest: str = ""
    size: int = 0
    mtime_ns: int = 0
    remembered: bool = False

    @property
    def problem(self) -> str | None:
        """Why a run would end on this file, or None."""
        return next((found.detail for found in self.findings if KINDS[found.kind].severity == KILLS), None)


def decode_files(
    paths: Iterable[str], *, processes: int = 1, timeout_sec: float = TIMEOUT_SEC
) -> Generator[tuple[str, str | None], None, None]:
    """Whether files can be decoded: (path, None), or (path, in words why not), each path once, in any order.

    Args:
        paths: the files; taken as they are needed.
        processes: child processes; they end when the iterator does, or is closed.
        timeout_sec: a file that takes longer counts as one that the decoder does not come to an end with.

    Raises:
        RuntimeError: if the decoder does not even start.

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
    """Everything there is to say about files, as `decode_files`; those that are `remembered` are not opened."""
    threads = max(1, usable_cpus() // processes)
    words = [str(threads), str(timeout_sec)]
    queue = iter(paths)
    alone: list[str] = []  # large ones, and those of batches that a child died of
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
        return Finding("hang", "the decoder does not come to an end")
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return Finding("crash", f"it crashes the decoder ({how})")


class _Child:
    """A child process that inspects a batch of files at a time."""

    def __init__(self, words: list[str]) -> None:
        self.connection, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fast_spatial.pipelines.inspection.decoding", str(theirs.fileno()), *words],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            process_group=0,  # Ctrl-C is the parent's affair
            env=environment_of_children(),
        )
        theirs.close()
        self.batch: list[str] = []
        self.started = False
        self.spent = False

    def ask(self, batch: list[str]) -> None:
        self.batch = batch
        with suppress(ConnectionError):  # it died; asking for the answer tells
            self.connection.send_bytes(json.dumps(batch).encode())

    def answer(self) -> list[Report] | None:
        """The batch's reports; None for its first word, that it has started.

        Raises:
            RuntimeError: if it died before that.

        """
        try:
            word = json.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            self.spent = True
            status = self.end()
            if not self.started:
                raise RuntimeError(f"the decoder does not start: its process ended with {status}") from None
            found = _death(status) if len(self.batch) == 1 else _ALONE
            return [Report(path, [found]) for path in self.batch]
        if not self.started:
            self.started = True
            return None
        reports, self.spent = word
        return [Report(path, [Finding(*pair) for pair in findings], *about) for path, findings, *about in reports]

    def end(self) -> int:
        """Its exit status: its own if it had ended, else that of being killed."""
        self.connection.close()
        self._process.kill()
        return self._process.wait()


# --- in the child


@pipeline_def
def _shape_graph() -> Any:
    return fn.peek_image_shape(fn.external_source(name="encoded"), adjust_orientation=False)


@pipeline_def
def image_graph() -> Any:
    """Whole images, by training's operator on CPUs: uint8 [H, W, 3], of `encoded` files and their `size`, int32 [2]."""
    encoded, size = fn.external_source(name="encoded"), fn.external_source(name="size")
    return decode_box(encoded, np.zeros(2, np.int32), size, Decoding("cpu"))


class _Decoder:
    """Decodes whole images with training's operator, and says what is wrong with those that it cannot."""

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
        """What is wrong with each content: a reason not to decode it, a complaint of the decoder, or nothing.

        `alone`: the process was asked for nothing else; a large image spends it.
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
                return Finding("too_large", f"its header says {sizes[0, 1]} x {sizes[0, 0]} pixels")
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
        """New pipelines, proven on a sample."""
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
        """(height, width) of each, int64 [N, 2], from the decoder's own reading of the header."""
        (shapes,) = self._shapes.run(encoded=[np.frombuffer(content, np.uint8) for content in contents])
        return np.stack([np.array(shapes[k])[:2] for k in range(len(contents))]).astype(np.int64)

    def _decode(self, contents: list[bytes], sizes: Any) -> None:
        encoded = [np.frombuffer(content, np.uint8) for content in contents]
        self._images.run(encoded=encoded, size=list(sizes.astype(np.int32)))

    def _complaint(self) -> str:
        """What the decoder printed since it was last asked, in a line."""
        os.lseek(self._stderr, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self._stderr), "rb") as file:
            lines = _COLOURS.sub("", file.read(1 << 16).decode(errors="replace")).splitlines()
        os.ftruncate(self._stderr, 0)
        os.lseek(self._stderr, 0, os.SEEK_SET)
        return next((_PREFIX.sub("", line) for line in lines if _COMPLAINT.search(line)), "")


def reason_of(error: RuntimeError) -> str:
    """What DALI says the matter was, in a line."""
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
    """Answer batches of paths until the parent is gone."""
    signal.setitimer(signal.ITIMER_REAL, _START_SEC)
    with suppress(OSError):  # where memory runs out, the kernel is to end this process rather than any other
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
