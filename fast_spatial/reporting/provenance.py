"""The report's sections on deviations from the reference, and on how to repeat the runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fast_spatial.config.modes import DIGITS
from fast_spatial.config.recipes import todays_command
from fast_spatial.reporting import deviations
from fast_spatial.reporting.document import Block, Code, Table, Text
from fast_spatial.reporting.runs import Row
from fast_spatial.reporting.tables import DASH


def deviating(rows: Sequence[Row]) -> list[Block]:
    """Deviations by options, and built-in deviations."""
    blocks: list[Block] = []
    changed = deviations.options(
        {row.name: row.first.config for row in rows}, {row.name: row.first.epochs for row in rows}
    )
    if changed:
        lines = [[f"`{name}`", reference, ours] for name, reference, ours in changed]
        blocks += [
            Text("Options that are not the reference's (ResNet-18 on ImageNet, 110 epochs):"),
            Table(["option", "the reference", "here"], lines, text_columns=3),
        ]
    else:
        blocks.append(Text("All options that decide numbers are the reference's."))
    if any(run.data == DIGITS for row in rows for run in row.runs):
        blocks.append(Text("The images are scikit-learn's handwritten digits, not ImageNet's."))
    return [
        *blocks,
        Text("Built in, whatever the options:"),
        Table(["ours", "the reference", "why, and how much"], deviations.BUILT_IN, text_columns=3),
    ]


def repeating(rows: Sequence[Row]) -> list[Block]:
    """The commands, and the machines that ran them."""
    runs = [run for row in rows for run in row.runs]
    starts = [start for run in runs for start in run.starts]
    commands = _distinct(todays_command(start["command"]) for start in starts if start.get("command"))
    blocks: list[Block] = [Code("\n".join(commands)) if commands else Text("The command is not known.")]
    if not starts:
        return [*blocks, Text("No run here has an `environment.jsonl`, so what it ran on is not known.")]
    continued = sum(len(run.starts) - 1 for run in runs if run.starts)
    if continued:
        blocks.append(Text(f"Runs were continued {continued} times; the same command continues one that was stopped."))
    return [*blocks, Table(["ran on", ""], _machines(starts), text_columns=2)]


def _machines(starts: Sequence[dict[str, Any]]) -> list[list[str]]:
    """(what, all of its values) of the records of starts."""

    def of(name: str) -> str:
        given = (str(start[name]) for start in starts if start.get(name) not in (None, [], ""))
        return "; ".join(_distinct(given)) or DASH

    versions = _distinct(
        f"{package} {number}" for start in starts for package, number in (start.get("versions") or {}).items()
    )
    commits = _distinct(
        f"{start['commit']}{' with uncommitted changes' if start.get('dirty') else ''}"
        for start in starts
        if start.get("commit")
    )
    return [
        ["hardware", of("hardware")],
        ["processes", of("world_size")],
        ["NVIDIA driver", of("driver")],
        ["CUDA, cuDNN, NCCL", ", ".join(of(name) for name in ("cuda", "cudnn", "nccl"))],
        ["system", of("os")],
        ["Python", of("python")],
        ["packages", ", ".join(versions)],
        ["commit", "; ".join(commits) or DASH],
        ["started", _span(starts)],
    ]


def _span(starts: Sequence[dict[str, Any]]) -> str:
    times = sorted(start["started"] for start in starts if start.get("started"))
    if not times:
        return DASH
    return times[0] if len(times) == 1 else f"{times[0]} (the first), {times[-1]} (the last)"


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
