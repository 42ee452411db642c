"""The report's sections on accuracy: against the published table, against each other, and by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fast_spatial.config.modes import MODES, PUBLISHED
from fast_spatial.evaluation.landscape_files import Landscape
from fast_spatial.kernels.limits import GRID_VIEWS
from fast_spatial.kernels.spatial import GRID_IDENTITY
from fast_spatial.reporting.document import Block, Table, Text
from fast_spatial.reporting.runs import Row, Run
from fast_spatial.reporting.statistics import Interval, difference, mean, paired_difference, wilson
from fast_spatial.reporting.tables import ATTACKS, DASH, HEADS, counts, grid_images, grid_note, percent, points, signed

# ImageNet's validation images, the basis of the published percentages.
PUBLISHED_IMAGES = 50_000
_MANY_CLASSES = 20


def results(rows: Sequence[Row]) -> list[Block]:
    """Ours against the published table, and rows against each other on the same images."""
    judged = [row for row in rows if row.judged]
    blocks: list[Block] = [Text(problem) for row in rows for run in row.runs for problem in _problems(run)]
    if not judged:
        return [*blocks, Text("No run here was evaluated, so there is no table.")]
    named = [(row.name, run.summary) for row in judged for run in row.judged]
    blocks += [_protocol(judged), _against_published(judged)]
    if any(_comparable(row) for row in judged):
        about_published = (
            f"The published percentages are taken as shares of {PUBLISHED_IMAGES:,} images that are independent of "
            f"ours (Newcombe's hybrid score interval). Both were judged on the same images, so the intervals are "
            f"too wide rather than too short; no interval holds what another seed of the published run would give."
        )
    else:
        about_published = (
            f"The published rows stand beside ours for the trend. Differences are given only for all "
            f"{PUBLISHED_IMAGES:,} validation images of ImageNet, judged at 30 degrees and 24 px."
        )
    blocks.append(Text(about_published))
    if note := grid_note(named):
        blocks.append(Text(note))
    if any(summary.get("partial") for _, summary in named):
        blocks.append(Text("Some of these evaluations were limited on purpose (partial): they stand for no table."))
    return blocks + _against_each_other(judged)


def _problems(run: Run) -> list[str]:
    found = [f"{problem}." for problem in run.problems]
    if run.evaluation is None:
        found.append(
            f"{run.folder} was not evaluated ({run.epochs_done:g} of {run.epochs:g} epochs are in its log), and is "
            f"missing from the table."
        )
    return found


def _protocol(judged: Sequence[Row]) -> Text:
    summaries = [run.summary for row in judged for run in row.judged]
    judged_images = counts(summary["num_images"] for summary in summaries)
    limits = sorted({f"{s['degrees']:g} degrees and {s.get('translate_px', 24.0):.3g} px" for s in summaries})
    over_seeds = (
        ", or, where a row has several seeds, Student's t over their accuracies (none if they are equal), which is "
        "about other seeds on "
    )
    return Text(
        f"Top-1 accuracy in percent on {judged_images} validation images, attacked with rotations and translations of "
        f"up to {' or '.join(limits)} (at image size 224), and its 95 % interval in brackets: Wilson's over the images"
        + (f"{over_seeds}the same images." if any(len(row.judged) > 1 for row in judged) else ".")
    )


def _against_published(judged: Sequence[Row]) -> Table:
    """Every row over its published one, and their difference where both followed one protocol."""
    lines = []
    for row in judged:
        name = row.name if len(row.judged) == 1 else f"{row.name} ({len(row.judged)} seeds)"
        lines.append([name, *(percent(_accuracy(row, attack)) for attack in ATTACKS)])
        published = _published(row)
        if published:
            lines.append([" published, ImageNet", *(f"{value:.1f}" for value in published)])
        if published and _comparable(row):
            gained = (_gained(row, attack, value) for attack, value in zip(ATTACKS, published))
            lines.append([" ours less published", *map(points, gained)])
    return Table(["trained as", *HEADS], lines)


def _right(run: Run, attack: str) -> tuple[int, int] | None:
    """(right, judged) images of an evaluated run; None without this attack."""
    summary = run.summary
    pct = summary.get(f"{attack}_top1_pct")
    if pct is None:
        return None
    count = grid_images(summary) if attack == "grid" else summary["num_images"]
    return round(pct * count / 100), count


def _accuracy(row: Row, attack: str) -> Interval | None:
    found = [_right(run, attack) for run in row.judged]
    shares = [right for right in found if right is not None]
    if not shares:
        return None
    if len(shares) == 1:
        return wilson(*shares[0])
    return mean([right / count for right, count in shares]).clipped()


def _published(row: Row) -> tuple[float, ...] | None:
    config = row.first.config
    degrees = 0.0 if MODES[config.mode].warps == 0 else config.degrees
    return PUBLISHED.get((config.mode, degrees))


def _comparable(row: Row) -> bool:
    """Whether a row was evaluated under the published protocol."""
    return _published(row) is not None and all(
        s["num_images"] == PUBLISHED_IMAGES
        and not s.get("partial")
        and math.isclose(s["degrees"], 30.0)
        and math.isclose(s.get("translate_px", 24.0), 24.0)
        for s in (run.summary for run in row.judged)
    )


def _gained(row: Row, attack: str, published_pct: float) -> Interval | None:
    ours = _accuracy(row, attack)
    theirs = wilson(round(published_pct * PUBLISHED_IMAGES / 100), PUBLISHED_IMAGES)
    return None if ours is None else difference(ours, theirs)


def _against_each_other(judged: Sequence[Row]) -> list[Block]:
    """Every row minus the standard one (or the first), on the same images."""
    if len(judged) < 2:
        return []
    base = next((row for row in judged if row.first.config.mode == "standard"), judged[0])
    lines, other_images = [], []
    for row in judged:
        if row is base:
            continue
        pairs = _pairs(row.judged[0], base.judged[0])
        if pairs is None:
            other_images.append(row.name)
        else:
            lines.append([row.name, *(points(pairs[attack]) for attack in ATTACKS)])
    blocks: list[Block] = []
    if lines:
        blocks = [
            Text(
                f"Points gained over {base.name}, on the same images, with Newcombe's 95 % interval for paired "
                f"proportions" + (" (of the first seed of each)." if any(len(r.judged) > 1 for r in judged) else ".")
            ),
            Table([f"less {base.name}", *HEADS], lines),
        ]
    if other_images:
        blocks.append(Text(f"Judged on other images than {base.name}, so not paired: {'; '.join(other_images)}."))
    return blocks


def _pairs(run: Run, base: Run) -> dict[str, Interval | None] | None:
    """Differences by attack; None if these runs were not judged on the same images."""
    assert run.evaluation is not None and base.evaluation is not None
    mine, theirs = (
        {image["path"]: image for image in r.evaluation.get("images", [])} for r in (run, base) if r.evaluation
    )
    if not mine or mine.keys() != theirs.keys():
        return None
    found: dict[str, Interval | None] = {}
    for attack in ATTACKS:
        verdicts = [(mine[path].get(attack), theirs[path].get(attack)) for path in mine]
        both = [(bool(a), bool(b)) for a, b in verdicts if a is not None and b is not None]
        cells = [both.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))]
        found[attack] = paired_difference(*cells) if both else None
    return found


def classes(rows: Sequence[Row]) -> list[Block]:
    """Accuracy and loss by class."""
    judged = [(row.name, row.judged[0]) for row in rows if row.judged]
    accuracy = {name: _by_class(run) for name, run in judged if run.evaluation and run.evaluation.get("images")}
    maps = {row.name: run.landscape for row in rows if (run := row.mapped) is not None and run.landscape is not None}
    blocks = [*(_accuracy_by_class(accuracy) if accuracy else []), *(_loss_by_class(maps) if maps else [])]
    return blocks or [Text("No run here has verdicts or losses of single images.")]


def _accuracy_by_class(accuracy: dict[str, dict[str, _OfClass]]) -> list[Block]:
    """A table of classes, from the accuracies of each row's classes."""
    of_rows: dict[str, list[_OfClass]] = {}
    for found in accuracy.values():
        for name, of_class in found.items():
            of_rows.setdefault(name, []).append(of_class)

    def robust_pct(name: str) -> float:
        return sum(one.natural_pct if one.grid_pct is None else one.grid_pct for one in of_rows[name])

    lines = [
        [name, str(of_rows[name][0].images), *(_natural_and_grid(found.get(name)) for found in accuracy.values())]
        for name in _some(sorted(of_rows, key=robust_pct), sorted(of_rows))
    ]
    few = len(of_rows) <= _MANY_CLASSES
    text = "Percent of images that are right untouched, and on every view of the grid" + (
        "." if few else f": the ten hardest and the ten easiest of {len(of_rows)} classes."
    )
    return [Text(text), Table(["class", "images", *accuracy], lines)]


def _loss_by_class(maps: dict[str, Landscape]) -> list[Block]:
    """A table of classes, from each row's landscape."""
    losses = {name: _losses_by_class(landscape) for name, landscape in maps.items()}
    names = sorted({name for found in losses.values() for name in found})
    hardest = sorted(names, key=lambda c: -sum(found[c][1] for found in losses.values() if c in found))
    each = counts(landscape.about["images_per_class"] for landscape in maps.values())
    lines = [
        [c, *(" / ".join(signed(v, ".2f") for v in found[c]) if c in found else DASH for found in losses.values())]
        for c in _some(hardest, names)
    ]
    text = (
        f"Cross-entropy in nats by class, on the images of each that the subset holds ({each}): untouched / mean over "
        f"all {GRID_VIEWS} views / mean of each image's worst view"
        + ("." if len(names) <= _MANY_CLASSES else f"; the ten hardest and the ten easiest of {len(names)} classes.")
    )
    return [Text(text), Table(["class", *losses], lines)]


class _OfClass(NamedTuple):
    images: int
    natural_pct: float
    grid_pct: float | None
    grid_images: int


def _by_class(run: Run) -> dict[str, _OfClass]:
    assert run.evaluation is not None
    verdicts: dict[str, list[tuple[bool, bool | None]]] = {}
    for image in run.evaluation["images"]:
        verdicts.setdefault(image["path"].split("/")[1], []).append((image["natural"], image["grid"]))
    found = {}
    for name, of_class in verdicts.items():
        grid = [g for _, g in of_class if g is not None]
        natural_pct = 100 * sum(natural for natural, _ in of_class) / len(of_class)
        found[name] = _OfClass(len(of_class), natural_pct, 100 * sum(grid) / len(grid) if grid else None, len(grid))
    return found


def _natural_and_grid(found: _OfClass | None) -> str:
    if found is None:
        return DASH
    on_grid = DASH if found.grid_pct is None else f"{found.grid_pct:.0f}"
    few = f" (of {found.grid_images})" if 0 < found.grid_images < found.images else ""
    return f"{found.natural_pct:.0f} / {on_grid}{few}"


def _losses_by_class(landscape: Landscape) -> dict[str, tuple[float, float, float]]:
    names = np.array([image["class"] for image in landscape.about["images"]])
    loss = landscape.loss.reshape(len(names), -1)
    return {
        str(name): (
            float(loss[names == name, GRID_IDENTITY].mean()),
            float(loss[names == name].mean()),
            float(loss[names == name].max(axis=1).mean()),
        )
        for name in np.unique(names)
    }


def _some(by_hardness: Sequence[str], by_name: Sequence[str]) -> list[str]:
    if len(by_name) <= _MANY_CLASSES:
        return list(by_name)
    half = _MANY_CLASSES // 2
    return [*by_hardness[:half], *by_hardness[-half:]]
