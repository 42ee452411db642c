"""Atomic file writes: a file is never incomplete, even if the writing process is killed."""

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
    """Let `write` fill a temporary file beside `path`, flush it to disk, and rename it to `path`.

    An existing file is renamed to `keep`, if given.
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
    """Make renames survive a power failure, where the file system supports this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of killed writers of `path`. No process may be writing it."""
    for temporary in path.parent.glob(f"{_TEMPORARY}{path.name}.*"):
        temporary.unlink(missing_ok=True)


def check_writable(flag: str, file: str) -> None:
    """Raise a UserError if an option names a file that cannot be written. Missing folders are created with the file."""
    if not file:
        return
    if Path(file).is_dir():
        raise UserError(f"{flag} {file}: that is a folder", "name a file")
    folder = next(folder for folder in Path(file).absolute().parents if folder.exists())
    if not folder.is_dir():
        raise UserError(f"{flag} {file}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {file}: {folder} cannot be written", "name a file in another folder")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
