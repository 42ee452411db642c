"""Writing files whole: a reader, or a run that was killed, never meets half of one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fast_spatial.errors import UserError

_TEMPORARY = ".writing-"


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], *, keep: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it into place.

    What was at `path` before is kept as `keep`, if that is given.
    """
    # Several nodes may write the same file on a shared disk.
    temporary = path.with_name(f"{_TEMPORARY}{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make renames last through a power failure; a file system that cannot do so is left to itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed had written of a file; nobody may be writing it now."""
    for temporary in path.parent.glob(f"{_TEMPORARY}{path.name}.*"):
        temporary.unlink(missing_ok=True)


def check_writable(flag: str, file: str) -> None:
    """Raise a UserError unless an option names no file, or one that can be written; its folder is made when it is."""
    if not file:
        return
    if Path(file).is_dir():
        raise UserError(f"{flag} {file}: that is a folder; name a file")
    folder = next(folder for folder in Path(file).absolute().parents if folder.exists())
    if not folder.is_dir():
        raise UserError(f"{flag} {file}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {file}: {folder} cannot be written", "name a file in another folder")


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically; the folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
