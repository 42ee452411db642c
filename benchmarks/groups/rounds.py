"""Time contenders in interleaved rounds, so that drift of the machine affects all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fast_spatial.runtime.device import synchronized_time


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: description, with its settings.
        work: does part of the work and returns the number of items done.
        begin: untimed warm-up to the steady state; called before every round.
        end: releases resources such as threads and processes; called after the last round.

    """

    name: str
    work: Callable[[], int]
    begin: Callable[[], object] = lambda: None
    end: Callable[[], object] = lambda: None


def rates_of(contenders: Sequence[Contender], *, rounds: int, seconds: float) -> list[list[float]]:
    """Items per second, [contender][round]; the order of contenders rotates between rounds."""
    rates: list[list[float]] = [[] for _ in contenders]
    try:
        for contender in contenders:
            contender.begin()
            contender.work()
        for number in range(rounds):
            for place in range(len(contenders)):
                which = (place + number) % len(contenders)
                contender = contenders[which]
                contender.begin()
                rates[which].append(_rate(contender.work, seconds))
    finally:
        for contender in contenders:
            contender.end()
    return rates


def _rate(work: Callable[[], int], seconds: float) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    items, start = 0, synchronized_time(device)
    while True:
        items += work()
        spent = synchronized_time(device) - start
        if spent >= seconds:
            return items / spent


def compare(
    name: str, unit: str, ours: Contender, baselines: Sequence[Contender], *, rounds: int, seconds: float
) -> dict[str, Any]:
    """The speedup of `ours` over the baseline's fastest setting, round by round."""
    print(f"  {name}", flush=True)
    mine, *theirs = rates_of([ours, *baselines], rounds=rounds, seconds=seconds)
    best = max(range(len(theirs)), key=lambda which: statistics.median(theirs[which]))
    ratios = [a / b for a, b in zip(mine, theirs[best])]
    others = {
        baseline.name: statistics.median(rates)
        for baseline, rates in zip(baselines, theirs)
        if baseline is not baselines[best]
    }
    return {
        "name": name,
        "unit": unit,
        "rounds": rounds,
        "ours": {"what": ours.name, **spread(mine)},
        "baseline": {"what": baselines[best].name, **spread(theirs[best]), "other_settings": others},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def spread(rates: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of rates."""
    return {"median": _short(statistics.median(rates)), "min": _short(min(rates)), "max": _short(max(rates))}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
