"""A benchmark in plain words: the table of comparisons, and what limits training here."""

from __future__ import annotations

from typing import Any

# What to do when a stage is the slowest.
KNOBS = {
    "read": "put the images on a faster disk, or in memory",
    "decode": "give the loader more CPUs (--workers), or smaller files",
    "augment": "give the loader more CPUs (--workers)",
    "warp": "fewer candidates (--views) or more CPUs (--workers)",
    "score": "judge at a smaller side (--score-side)",
    "train": "a smaller --side, or half precision (--dtype)",
}


def table(result: dict[str, Any]) -> str:
    """The comparisons for people."""
    rows = []
    for found in result["comparisons"]:
        ours, baseline = found["ours"], found["baseline"]
        rate = f"{_number(ours['median']):>9} against {_number(baseline['median']):>7} {found['unit']}"
        range_ = f"{found['ratio']:6.2f} x ({found['ratio_min']:.2f} to {found['ratio_max']:.2f})"
        rows.append(f"  {found['name']:<22}{range_:<26}{rate}   {baseline['what']}")
    rows += [f"  {name:<22}skipped: {why}" for name, why in result["skipped"].items()]
    facts = [f"{name}: {', '.join(f'{k} {v}' for k, v in about.items())}" for name, about in result["facts"].items()]
    head = f"on {result['hardware']}; ratio: how many times faster ours is, median (range) over rounds"
    return "\n".join([head, *rows, *facts])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def stage_seconds(stages: dict[str, float]) -> dict[str, dict[str, float]]:
    """Seconds per image of each stage of training, by mode, from what was measured (images per second by stage).

    The loader's rates hold what came before: decoding is part of the standard pipeline, that is part of worst10's.
    """
    needed = ("read", "decode", "loader: standard", "loader: worst10", "forward and backward", "score")
    if any(name not in stages for name in needed):
        return {}
    one = {name: 1 / rate for name, rate in stages.items()}
    common = {
        "read": one["read"],
        "decode": max(one["decode"] - one["read"], 0.0),
        "augment": max(one["loader: standard"] - one["decode"], 0.0),
        "train": one["forward and backward"],
    }
    warps = max(one["loader: worst10"] - one["loader: standard"], 0.0)
    return {"standard": common, "worst10": {**common, "warp": warps, "score": one["score"]}}


def verdict(stages: dict[str, float]) -> list[str]:
    """What limits training, each stage's ceiling, and the knob to turn; empty if not all stages were measured."""
    lines = []
    for mode, seconds in stage_seconds(stages).items():
        slowest = max(seconds, key=lambda stage: seconds[stage])
        ceilings = ", ".join(f"{stage} {1 / spent:,.0f}" for stage, spent in seconds.items() if spent > 0)
        share = 100 * seconds[slowest] / sum(seconds.values())
        lines += [
            f"{mode}: {slowest} limits training here ({share:.0f} % of the work of an image)",
            f"  images/s that each stage could reach alone: {ceilings}",
            f"  what to do: {KNOBS[slowest]}",
        ]
    return lines
