"""The sections of a report, in the order of a reader's questions. All numbers come from the files of the runs."""

from __future__ import annotations

import math
import statistics as plain_statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fast_spatial.config.modes import DIGITS, MODES, PUBLISHED
from fast_spatial.config.recipes import recipe_as_typed, todays_command
from fast_spatial.evaluation.landscape import Landscape
from fast_spatial.kernels.spatial import GRID_IDENTITY, GRID_VIEWS
from fast_spatial.reporting import deviations, robustness
from fast_spatial.reporting.charts import Series, line_chart, ticks
from fast_spatial.reporting.document import (
    DASH,
    Block,
    Code,
    Figure,
    Figures,
    Section,
    Table,
    Text,
    percent,
    points,
    signed,
)
from fast_spatial.reporting.runs import Row, Run, Spent
from fast_spatial.reporting.statistics import Interval, difference, mean, paired_difference, wilson
from fast_spatial.reporting.tables import ATTACKS, HEADS, grid_images, grid_note

# ImageNet's validation images, the basis of the published percentages.
PUBLISHED_IMAGES = 50_000
_MANY_CLASSES = 20


def sections(rows: Sequence[Row], budgets: Sequence[Spent], price: float) -> list[Section]:
    """All sections; `price` is the price of a GPU-hour, 0 if unknown."""
    return [
        Section("Results", results(rows)),
        Section("Cost", cost(rows, price)),
        *([Section("Budget", spent(rows, budgets))] if budgets else []),
        Section("Learning curves", learning(rows)),
        Section("Robustness", robustness.curves(rows)),
        Section("Landscape", robustness.landscapes(rows)),
        Section("Worst views", robustness.worst_views(rows)),
        Section("Classes", classes(rows)),
        Section("Deviations from the reference", deviating(rows)),
        Section("How to repeat it", repeating(rows)),
    ]


def title(rows: Sequence[Row]) -> str:
    """The title: number of models, and their data."""
    data = ", ".join(sorted({_data(run) for row in rows for run in row.runs}))
    models = sum(len(row.runs) for row in rows)
    return f"Rotations and translations: {models} {'model' if models == 1 else 'models'} on {data}"


# --- results


def results(rows: Sequence[Row]) -> list[Block]:
    """Ours against the published table, and rows against each other on the same images."""
    judged = [row for row in rows if row.judged]
    blocks: list[Block] = [Text(problem) for row in rows for run in row.runs for problem in _problems(run)]
    if not judged:
        return [*blocks, Text("No run here was evaluated, so there is no table.")]
    summaries = [run.evaluation["summary"] for row in judged for run in row.judged if run.evaluation]
    counts = sorted({summary["num_images"] for summary in summaries})
    limits = sorted({f"{s['degrees']:g} degrees and {s.get('translate_px', 24.0):.3g} px" for s in summaries})
    blocks.append(
        Text(
            f"Top-1 accuracy in percent on {' or '.join(f'{count:,}' for count in counts)} validation images, attacked "
            f"with rotations and translations of up to {' or '.join(limits)} (of a side of 224), and its 95 % interval "
            f"in brackets: Wilson's over the images"
            + (
                ", or, where a row has several seeds, Student's t over their accuracies, which is about other seeds on "
                "the same images."
                if any(len(row.judged) > 1 for row in judged)
                else "."
            )
        )
    )
    lines = []
    for row in judged:
        lines.append([_with_seeds(row), *(percent(_accuracy(row, attack)) for attack in ATTACKS)])
        published = _published(row)
        if published:
            lines.append([" published, ImageNet", *(f"{value:.1f}" for value in published)])
            if _comparable(row):
                lines.append([" ours less published", *(_against_published(row, attack) for attack in ATTACKS)])
    blocks.append(Table(["trained as", *HEADS], lines))
    if any(_comparable(row) for row in judged):
        blocks.append(
            Text(
                f"The published percentages are taken as shares of {PUBLISHED_IMAGES:,} images that are independent of "
                f"ours (Newcombe's hybrid score interval). Both were judged on the same images, so the intervals are "
                f"too wide rather than too short; no interval holds what another seed of the published run would give."
            )
        )
    else:
        blocks.append(
            Text(
                f"The published rows stand beside ours for the trend. Differences are given only for all "
                f"{PUBLISHED_IMAGES:,} validation images of ImageNet, judged at 30 degrees and 24 px."
            )
        )
    note = grid_note((row.name, run.evaluation["summary"]) for row in judged for run in row.judged if run.evaluation)
    if note:
        blocks.append(Text(note))
    if any(s.get("partial") for s in summaries):
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


def _with_seeds(row: Row) -> str:
    return row.name if len(row.judged) == 1 else f"{row.name} ({len(row.judged)} seeds)"


def _right(run: Run, attack: str) -> tuple[int, int] | None:
    """(right, judged) images of an evaluated run; None without this attack."""
    assert run.evaluation is not None
    summary = run.evaluation["summary"]
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
    over_seeds = mean([right / count for right, count in shares])
    return Interval(over_seeds.value, max(0.0, over_seeds.low), min(1.0, over_seeds.high))


def _published(row: Row) -> tuple[float, ...] | None:
    config = row.first.config
    degrees = 0.0 if MODES[config.mode].warps == 0 else config.degrees
    return PUBLISHED.get((config.mode, degrees))


def _comparable(row: Row) -> bool:
    """Whether a row was evaluated under the published protocol."""
    summaries = [run.evaluation["summary"] for run in row.judged if run.evaluation]
    return _published(row) is not None and all(
        s["num_images"] == PUBLISHED_IMAGES
        and not s.get("partial")
        and math.isclose(s["degrees"], 30.0)
        and math.isclose(s.get("translate_px", 24.0), 24.0)
        for s in summaries
    )


def _against_published(row: Row, attack: str) -> str:
    ours, published = _accuracy(row, attack), _published(row)
    assert published is not None
    right = round(published[ATTACKS.index(attack)] * PUBLISHED_IMAGES / 100)
    return points(None if ours is None else difference(ours, wilson(right, PUBLISHED_IMAGES)))


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
        blocks.append(Text(f"Judged on other images than {base.name}, so not paired: {', '.join(other_images)}."))
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


# --- cost


def cost(rows: Sequence[Row], price: float) -> list[Block]:
    """Hours, GPU-hours, money, images/s and energy of every run."""
    lines, kwh_known, gpus_used = [], False, False
    total_gpu_hours = 0.0
    for row in rows:
        for run in row.runs:
            if not run.log:
                continue
            gpus = _gpus(run)
            train_sec = run.log[-1]["elapsed_sec"]
            evaluate_sec = (run.result or {}).get("seconds_evaluate")
            gpu_hours = run.log[-1].get("gpu_hours", 0.0) + gpus * (evaluate_sec or 0.0) / 3600
            if run.landscape is not None:
                gpu_hours += run.landscape.about["gpus"] * run.landscape.about["seconds"] / 3600
            kwh = [record["energy_kwh"] for record in run.log if "energy_kwh" in record]
            kwh_known, gpus_used = kwh_known or bool(kwh), gpus_used or gpus > 0
            total_gpu_hours += gpu_hours
            rates = [record["images_per_sec"] for record in run.records("train")]
            lines.append(
                [
                    row.name if len(row.runs) == 1 else f"{row.name}, seed {run.config.seed}",
                    str(gpus or DASH),
                    _duration(train_sec),
                    DASH if evaluate_sec is None else _duration(evaluate_sec),
                    f"{gpu_hours:.2f}" if gpus else DASH,
                    f"{price * gpu_hours:.2f}" if gpus and price else DASH,
                    f"{plain_statistics.median(rates):,.0f}" if rates else DASH,
                    f"{sum(kwh):.3f}" if kwh else DASH,
                ]
            )
    if not lines:
        return [Text("No run here has a log yet.")]
    head = ["trained as", "GPUs", "training", "evaluation", "GPU-hours", "price", "images/s", "kWh"]
    notes = ["Times are of the clock on the wall; images/s is the median epoch's, training alone."]
    if gpus_used:
        notes.append(
            f"All of it took {total_gpu_hours:.2f} GPU-hours, evaluations and landscapes included"
            + (f", which come to {price * total_gpu_hours:.2f} at {price:g} each." if price else ".")
        )
        if not price:
            notes.append("No price was given (`--price`, of a GPU-hour), so none is shown.")
    else:
        notes.append("These runs used no GPU: there are no GPU-hours, and nothing to price.")
    if kwh_known:
        notes.append(
            "kWh is what the GPUs used while training, by NVML's counters; the rest of the machine is not in it."
        )
    else:
        notes.append("No energy is in the logs: NVML gave none.")
    told = [i for i in range(len(head)) if any(line[i] != DASH for line in lines)]
    table = Table([head[i] for i in told], [[line[i] for i in told] for line in lines])
    return [table, Text(" ".join(notes))]


def _gpus(run: Run) -> int:
    return int(run.starts[-1]["world_size"]) if run.starts and run.starts[-1].get("gpus") else 0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- budget


def spent(rows: Sequence[Row], budgets: Sequence[Spent]) -> list[Block]:
    """The plans of budgets, and their results."""
    runs = {run.folder.resolve(): run for row in rows for run in row.runs}
    blocks: list[Block] = []
    for budget in budgets:
        asked, planned = budget.plan["budget"], budget.plan["rows"]
        limit = f", {100 * budget.used_sec / (3600 * asked['hours']):.0f} % of it" if asked.get("hours") else ""
        blocks.append(
            Text(
                f"`{asked['asked']}`: {_duration(budget.used_sec)} were in use when this was written{limit}. Rows are "
                f"planned for equally many epochs; a training takes as many steps as its time allows, and its learning "
                f"rate is down at the last one, but where it says stopped."
            )
        )
        lines = []
        for row in planned:
            run = runs.get(Path(row["train"]["out"]).resolve())
            segments = [] if run is None else run.records("segment")
            stopped = bool(segments) and segments[-1]["start"] == segments[-1]["end"]
            lines.append(
                [
                    row["name"],
                    recipe_as_typed(str(row["train"]["recipe"]), row["train"]["epochs"]),
                    f"{row['epochs']:.1f}",
                    DASH if run is None else f"{run.epochs_done:.1f}{', stopped' if stopped else ''}",
                    str(len(segments) or DASH),
                ]
            )
        head = ["trained as", "recipe", "epochs planned", "epochs trained", "decisions on its pace"]
        blocks.append(Table(head, lines, text_columns=2))
        blocks += [Text(f"Left out: {reason}.") for reason in budget.plan["left_out"]]
    return blocks


# --- learning


def learning(rows: Sequence[Row]) -> list[Block]:
    """Loss and accuracy over epochs."""
    wanted = (
        ("train", "loss", "Training loss, on the views trained on", "cross-entropy, nats"),
        ("train", "top1_pct", "Training accuracy, on the views trained on", "top-1 accuracy, %"),
        ("evaluation", "top1_pct", "Validation accuracy, untouched images", "top-1 accuracy, %"),
        (
            "evaluation",
            "attacked_top1_pct",
            "Validation accuracy under each row's training attack",
            "top-1 accuracy, %",
        ),
    )
    figures = []
    for event, name, caption, y_label in wanted:
        series = []
        for style, row in enumerate(rows):
            for run in row.runs:
                points = [(r["epoch"], r[name]) for r in run.records(event) if r.get(name) is not None]
                if points:
                    series.append(Series(row.name, points, style))
        if any(len(one.points) > 1 for one in series):
            figures.append(Figure(caption, line_chart(caption, "epoch", y_label, series, x_ticks=_whole_ticks(series))))
    if not figures:
        return [Text("No run here has finished two epochs.")]
    text = (
        "A line per run; seeds of one row look alike. Training numbers are of the weights as they changed during the "
        "epoch. Rows that train without warps have no training attack."
    )
    if all(len(run.records("evaluation")) < 2 for row in rows for run in row.runs):
        text += " No training was evaluated more than once, so there are no curves of validation accuracy."
    return [Text(text), Figures(figures)]


def _whole_ticks(series: Sequence[Series]) -> list[int]:
    epochs = [x for one in series for x, _ in one.points]
    return sorted({round(tick) for tick in ticks(min(epochs), max(epochs), 6)})


# --- classes


def classes(rows: Sequence[Row]) -> list[Block]:
    """Accuracy and loss by class."""
    judged = {row.name: row.judged[0] for row in rows if row.judged}
    accuracy = {name: _by_class(run) for name, run in judged.items() if run.evaluation and run.evaluation.get("images")}
    blocks: list[Block] = []
    if accuracy:
        found_of = {
            c: [found[c] for found in accuracy.values() if c in found] for found in accuracy.values() for c in found
        }
        hardest = sorted(
            found_of, key=lambda c: sum(f.natural_pct if f.grid_pct is None else f.grid_pct for f in found_of[c])
        )
        lines = [
            [c, str(found_of[c][0].images), *(_natural_and_grid(found.get(c)) for found in accuracy.values())]
            for c in _some(hardest, sorted(found_of))
        ]
        few = len(found_of) <= _MANY_CLASSES
        blocks += [
            Text(
                "Percent of images that are right untouched, and on every view of the grid"
                + ("." if few else f": the ten hardest and the ten easiest of {len(found_of)} classes.")
            ),
            Table(["class", "images", *accuracy], lines),
        ]
    maps = {row.name: run.landscape for row in rows if (run := row.mapped) is not None and run.landscape is not None}
    if maps:
        losses = {name: _losses_by_class(landscape) for name, landscape in maps.items()}
        names = sorted({c for found in losses.values() for c in found})
        hardest = sorted(names, key=lambda c: -sum(found[c][1] for found in losses.values() if c in found))
        each = next(iter(maps.values())).about["images_per_class"]
        lines = [
            [c, *(" / ".join(signed(v, ".2f") for v in found[c]) if c in found else DASH for found in losses.values())]
            for c in _some(hardest, names)
        ]
        blocks += [
            Text(
                f"Cross-entropy in nats by class, on the {each} {'image' if each == 1 else 'images'} of each that the "
                f"subset holds: untouched / mean over all {GRID_VIEWS} views / mean of each image's worst view."
            ),
            Table(["class", *losses], lines),
        ]
    return blocks or [Text("No run here has verdicts or losses of single images.")]


class _OfClass(NamedTuple):
    images: int
    natural_pct: float
    grid_pct: float | None


def _by_class(run: Run) -> dict[str, _OfClass]:
    assert run.evaluation is not None
    verdicts: dict[str, list[tuple[bool, bool | None]]] = {}
    for image in run.evaluation["images"]:
        verdicts.setdefault(image["path"].split("/")[-2], []).append((image["natural"], image["grid"]))
    found = {}
    for name, of_class in verdicts.items():
        grid = [g for _, g in of_class if g is not None]
        natural_pct = 100 * sum(natural for natural, _ in of_class) / len(of_class)
        found[name] = _OfClass(len(of_class), natural_pct, 100 * sum(grid) / len(grid) if grid else None)
    return found


def _natural_and_grid(found: _OfClass | None) -> str:
    if found is None:
        return DASH
    return f"{found.natural_pct:.0f} / {DASH if found.grid_pct is None else f'{found.grid_pct:.0f}'}"


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


# --- deviations and repetition


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
    data = {_data(run) for row in rows for run in row.runs}
    if DIGITS in data:
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
    blocks: list[Block] = [
        Code("\n".join(commands)) if commands else Text("The command is not known: nothing was started by launch.py.")
    ]
    if not starts:
        return [*blocks, Text("No run here has an `environment.jsonl`, so what it ran on is not known.")]
    continued = sum(len(run.starts) - 1 for run in runs if run.starts)
    if continued:
        blocks.append(Text(f"Runs were continued {continued} times; the same command continues one that was stopped."))

    def of(name: str) -> str:
        return (
            "; ".join(_distinct(str(start[name]) for start in starts if start.get(name) not in (None, [], ""))) or DASH
        )

    versions = _distinct(
        f"{package} {number}" for start in starts for package, number in (start.get("versions") or {}).items()
    )
    commits = _distinct(
        f"{start['commit']}{' with uncommitted changes' if start.get('dirty') else ''}"
        for start in starts
        if start.get("commit")
    )
    lines = [
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
    return [*blocks, Table(["ran on", ""], lines, text_columns=2)]


def _span(starts: Sequence[dict[str, Any]]) -> str:
    times = sorted(start["started"] for start in starts if start.get("started"))
    if not times:
        return DASH
    return times[0] if len(times) == 1 else f"{times[0]} (the first), {times[-1]} (the last)"


def _data(run: Run) -> str:
    return run.config.data.rstrip("/").split("/")[-1]


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
