"""File names in messages."""

from __future__ import annotations


def printable(path: str) -> str:
    """A path that is safe to print on a terminal, whatever bytes it contains."""
    return path if path.isprintable() else repr(path)


def some(names: list[str]) -> str:
    """The first three names of a list and the number of others, on one line."""
    first = [printable(name[:100]) for name in names[:3]]
    return ", ".join(first or ["none"]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
