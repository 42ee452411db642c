"""Checkpoints of a training: written atomically in the background, and found again after a crash."""

from __future__ import annotations

import io
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fast_spatial.errors import UserError
from fast_spatial.models import checkpoint
from fast_spatial.runtime.files import remove_leftovers, write_atomically
from fast_spatial.runtime.run_files import BEST, LAST, PREVIOUS


class Saver:
    """Writes a run's checkpoints: `last.pt`, its predecessor as `previous.pt`, and `best.pt`.

    `save` copies a state to host memory; a thread writes it while training continues. The next call raises the
    thread's error, if any.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[None] | None = None
        for name in (LAST, BEST):
            remove_leftovers(out / name)

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Save a state of tensors and plain values; with `best`, also as `best.pt`.

        Raises:
            UserError: if the previous state could not be written.

        """
        self.wait()
        self._writing = self._thread.submit(self._write, _snapshot(state), best)

    def set_aside(self, damaged: list[Path]) -> None:
        """Rename damaged checkpoints, so that none replaces a good one. No process may be reading them."""
        for path in damaged:
            path.replace(path.with_name(f"{path.name}.damaged"))

    def wait(self) -> None:
        """Wait until the last state is on disk.

        Raises:
            UserError: if it could not be written.

        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            kept = [name for name in (LAST, PREVIOUS) if (self._out / name).is_file()]
            whole = f"; the earlier {kept[0]} is intact" if kept else ""
            raise UserError(
                f"--out {self._out}: cannot write a checkpoint ({error.strerror or error}){whole}",
                "free disk space or make the folder writable, then run the same command to resume",
            ) from error

    def close(self) -> None:
        """Wait for the writing thread to end; its error, if any, is dropped."""
        self._thread.shutdown()

    def _write(self, state: dict[str, Any], best: bool) -> None:
        buffer = io.BytesIO()  # torch.save to a file would hide the file's error
        torch.save(state, buffer)
        content = buffer.getbuffer()
        if best:  # before last.pt: a run that resumes from last.pt does not evaluate this epoch again
            write_atomically(self._out / BEST, lambda file: file.write(content))
        last = self._out / LAST
        write_atomically(last, lambda file: file.write(content), keep=self._out / PREVIOUS)


class Found(NamedTuple):
    """A run's newest intact checkpoint (None: none was saved), and newer ones that are damaged."""

    state: dict[str, Any] | None
    damaged: list[Path]


def find_latest(out: Path) -> Found:
    """The newest intact checkpoint of a run's folder.

    Raises:
        UserError: if the folder has checkpoints, but none to resume from.

    """
    damaged: list[Path] = []
    for path in (out / LAST, out / PREVIOUS):
        if not path.is_file():
            continue
        if not os.access(path, os.R_OK):
            raise UserError(
                f"--out {out}: permission denied for {path.name}", "make it readable, or choose another folder"
            )
        try:
            return Found(checkpoint.load(path), damaged)
        except checkpoint.DamagedCheckpoint:
            damaged.append(path)
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise checkpoint.DamagedCheckpoint(
            f"--out {out}: its checkpoints ({names}) are damaged", "choose another folder"
        )
    if (out / BEST).is_file():
        raise UserError(
            f"--out {out}: contains {BEST}, but no {LAST} to resume from", f"choose another folder, or move {BEST} away"
        )
    return Found(None, [])


def _snapshot(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_snapshot(item) for item in value)
    return value
