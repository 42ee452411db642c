"""A benchmark in plain words: the table of comparisons, and what limits training here."""

from __future__ import annotations

import textwrap
from typing import Any

# What to do when a stage is the slowest.
KNOBS = {
    "read": "put the images on a faster disk, or in memory",
    "decode": "give the loader more CPUs (--workers), or smaller files",
    "augment": "give the loader more CPUs (--workers)",
    "warp": "fewer candidates (--views) or more CPUs (--workers)",
    "score": "judge at a smaller side (--score-size), or fewer candidates (--views)",
    "train": "train at a smaller --image-size, or on hardware with faster half precision",
}


LEGEND = (
    "\nread: files from the disk; decode: JPEG to pixels; augment: resizing and colours;\n"
    "score: choosing the worst view; train: forward and backward"
)

# Facts that need a sentence.
SENTENCES = {
    "score_side": "judging views at {score_side} px instead of {side} picks the same one for {same_view_pct} % of "
    "{images} images, and {loss_found_pct} % of the highest loss (model: {model})",
    "grid": "{survivors} of {images} images are right on all 775 views; {views_per_image} were judged for an "
    "image on average (model: {model})",
}


def table(result: dict[str, Any]) -> str:
    """The comparisons for people: a line for each, and below it what ours was compared with."""
    lines = [
        f"\nOn {result['hardware']}; medians, and the range over rounds.",
        f"  {'':<24}{'times faster':<24}{'ours':>9}{'theirs':>9}",
    ]
    for found in result["comparisons"]:
        ours, baseline = found["ours"], found["baseline"]
        ratio = f"{found['ratio']:.2f} ({found['ratio_min']:.2f} to {found['ratio_max']:.2f})"
        rates = f"{_number(ours['median']):>9}{_number(baseline['median']):>9} {found['unit']}"
        lines += [f"  {found['name']:<24}{ratio:<24}{rates}", f"    theirs: {baseline['what']}"]
    lines += [f"  {name:<24}skipped: {why}" for name, why in result["skipped"].items()]
    facts = [f"{name}: {_fact(name, about)}" for name, about in result["facts"].items()]
    lines += [textwrap.fill(fact, 100, initial_indent="  ", subsequent_indent="    ") for fact in facts]
    return "\n".join(lines)


def _fact(name: str, about: dict[str, Any]) -> str:
    if name in SENTENCES:
        return SENTENCES[name].format(**about)
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items())


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
            f"\nmode {mode}: {slowest} is the bottleneck here, with {share:.0f} % {what}",
            f"  images/s that each stage could reach alone: {ceilings}",
            f"  what to do: {KNOBS[slowest]}",
        ]
    return [*lines, LEGEND] if lines else []
