"""Names of files in messages."""

from __future__ import annotations


def printable(path: str) -> str:
    """A path as it may be written to a terminal, whatever bytes it has."""
    return path if path.isprintable() else repr(path)


def some(names: list[str]) -> str:
    """The first names of a list, whatever they hold, for one line of a message."""
    first = [printable(name[:100]) for name in names[:3]]
    return ", ".join(first or ["none"]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
