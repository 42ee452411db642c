"""A benchmark in plain words: the table of comparisons, and what limits training here."""

from __future__ import annotations

from typing import Any

# What to do when a stage is the slowest.
KNOBS = {
    "read": "put the images on a faster disk, or in memory",
    "decode": "give the loader more CPUs (--workers), or smaller files",
    "augment": "give the loader more CPUs (--workers)",
    "warp": "fewer candidates (--views) or more CPUs (--workers)",
    "score": "judge at a smaller side (--score-side), or fewer candidates (--views)",
    "train": "train at a smaller --side, or on hardware with faster half precision",
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


def stage_seconds(stages: dict[str, float]) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds per image of the loader's and of the network's stages, by mode.

    Made of what was measured (images per second by stage): the loader's rates hold what came before, since decoding is
    part of the standard pipeline, which is part of worst10's.
    """
    needed = ("read", "decode", "loader: standard", "loader: worst10", "forward and backward", "score")
    if any(name not in stages for name in needed):
        return {}
    one = {name: 1 / rate for name, rate in stages.items()}
    read = min(one["read"], one["loader: standard"])  # the loader reads ahead
    loader = {
        "read": read,
        "decode": max(one["decode"] - read, 0.0),
        "augment": max(one["loader: standard"] - one["decode"], 0.0),
    }
    warp = {"warp": max(one["loader: worst10"] - one["loader: standard"], 0.0)}
    network = {"train": one["forward and backward"]}
    return {
        "standard": {"loader": loader, "network": network},
        "worst10": {"loader": loader | warp, "network": {"score": one["score"]} | network},
    }


def verdict(stages: dict[str, float], *, overlapping: bool) -> list[str]:
    """What limits training, each stage's ceiling, and the knob to turn; empty if not all stages were measured.

    `overlapping`: the network runs on a GPU while the loader works on CPUs, so that the slower of the two decides.
    """
    lines = []
    for mode, sides in stage_seconds(stages).items():
        slower = max(sides, key=lambda side: sum(sides[side].values()))
        seconds = sides["loader"] | sides["network"]
        candidates = sides[slower] if overlapping else seconds
        slowest = max(candidates, key=lambda stage: candidates[stage])
        ceilings = ", ".join(f"{stage} {1 / spent:,.0f}" for stage, spent in seconds.items() if spent > 0)
        share = 100 * seconds[slowest] / sum(candidates.values())
        what = f"of the {slower}'s work for an image" if overlapping else "of the work for an image"
        lines += [
            f"{mode}: {slowest} limits training here ({share:.0f} % {what})",
            f"  images/s that each stage could reach alone: {ceilings}",
            f"  what to do: {KNOBS[slowest]}",
        ]
    return lines
