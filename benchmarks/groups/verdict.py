"""The text output of a benchmark: the table of comparisons, and the stage that limits training."""

from __future__ import annotations

import textwrap
from typing import Any

# Advice when a stage is the slowest.
KNOBS = {
    "read": "put the images on a faster disk or in memory",
    "decode": "give the loader more CPUs (--workers), or use smaller files",
    "augment": "give the loader more CPUs (--workers)",
    "warp": "use fewer candidate views (--views) or more CPUs (--workers)",
    "score": "score at a smaller image size (--score-size), or use fewer candidate views (--views)",
    "train": "use a smaller --image-size, or hardware with faster half precision",
}


LEGEND = (
    "\nread: files from disk; decode: JPEG to pixels; augment: resizing and colours;\n"
    "score: selecting the worst view; train: forward and backward"
)

# Facts that are printed as a sentence.
SENTENCES = {
    "score_side": "scoring at {score_side} px instead of {side} selects the same view for {same_view_pct} % of "
    "{images} images, and {loss_found_pct} % of the highest loss (model: {model})",
    "grid": "{survivors} of {images} images are classified correctly on all 775 views; mean views evaluated per "
    "image: {views_per_image} (model: {model})",
}


def table(result: dict[str, Any]) -> str:
    """The comparisons as text: a line for each, followed by its baseline."""
    lines = [
        f"\nOn {result['hardware']}; medians, and range over rounds.",
        f"  {'':<24}{'speedup':<24}{'ours':>9}{'baseline':>9}",
    ]
    for found in result["comparisons"]:
        ours, baseline = found["ours"], found["baseline"]
        ratio = f"{found['ratio']:.2f} ({found['ratio_min']:.2f} to {found['ratio_max']:.2f})"
        rates = f"{_number(ours['median']):>9}{_number(baseline['median']):>9} {found['unit']}"
        lines += [f"  {found['name']:<24}{ratio:<24}{rates}", f"    baseline: {baseline['what']}"]
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
    """Seconds per image of the loader's and of the network's stages, by mode; empty if a stage was not measured.

    `stages` holds images per second. The loader's rates are cumulative: the standard pipeline includes decoding, and
    worst10's pipeline includes the standard one.
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
    """The limiting stage, each stage's ceiling, and the option to change; empty if a stage was not measured.

    `overlapping`: the network runs on a GPU in parallel with the loader on CPUs, so only the slower of the two counts.
    """
    lines = []
    for mode, sides in stage_seconds(stages).items():
        slower = max(sides, key=lambda side: sum(sides[side].values()))
        seconds = sides["loader"] | sides["network"]
        candidates = sides[slower] if overlapping else seconds
        slowest = max(candidates, key=lambda stage: candidates[stage])
        ceilings = ", ".join(f"{stage} {1 / spent:,.0f}" for stage, spent in seconds.items() if spent > 0)
        share = 100 * seconds[slowest] / sum(candidates.values())
        what = f"of the {slower}'s time per image" if overlapping else "of the time per image"
        lines += [
            f"\nmode {mode}: {slowest} is the bottleneck, with {share:.0f} % {what}",
            f"  images/s of each stage alone: {ceilings}",
            f"  what to do: {KNOBS[slowest]}",
        ]
    return [*lines, LEGEND] if lines else []
