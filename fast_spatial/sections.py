"""What a report says, section by section, in the order of a reader's questions; every number is of the runs' files."""

from __future__ import annotations

import math
import statistics as plain_statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_spatial import deviations
from fast_spatial.charts import Scale, Series, heat_map, line_chart
from fast_spatial.config import DIGITS, PUBLISHED
from fast_spatial.document import Block, Card, Code, Figure, Figures, Pictures, Section, Table, Text
from fast_spatial.landscape import Landscape
from fast_spatial.report import ATTACKS, HEADS
from fast_spatial.runs import Row, Run
from fast_spatial.statistics import Interval, difference, mean, paired_difference, wilson
from kernels.spatial import GRID_ANGLES, GRID_IDENTITY, GRID_SHIFTS, GRID_VIEWS

# ImageNet's validation images: as many as the published percentages are of.
PUBLISHED_IMAGES = 50_000
_MANY_CLASSES = 20
_MAPPED_IMAGES = 3
_DASH = "–"


def sections(rows: Sequence[Row], price: float) -> list[Section]:
    """All of them; `price` is that of a GPU-hour, 0 if it was not told."""
    return [
        Section("Results", results(rows)),
        Section("Cost", cost(rows, price)),
        Section("Learning curves", learning(rows)),
        Section("Robustness", robustness(rows)),
        Section("Landscape", landscapes(rows)),
        Section("Worst views", worst_views(rows)),
        Section("Classes", classes(rows)),
        Section("Deviations from the reference", deviating(rows)),
        Section("How to repeat it", repeating(rows)),
    ]


def title(rows: Sequence[Row]) -> str:
    """What the report is about."""
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
                ", or, where a row has several seeds, Student's t over their accuracies."
                if any(len(row.judged) > 1 for row in judged)
                else "."
            )
        )
    )
    lines = []
    for row in judged:
        lines.append([_with_seeds(row), *(_shown(_accuracy(row, attack)) for attack in ATTACKS)])
        published = _published(row)
        if published:
            lines.append(["", *(f"{value:.1f}" for value in published)])
            lines[-1][0] = "published, ImageNet"
            if _comparable(row):
                lines.append(["ours less published", *(_against_published(row, attack) for attack in ATTACKS)])
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
    if any(s.get("partial") for s in summaries):
        blocks.append(Text("Some of these evaluations were limited on purpose (partial): they stand for no table."))
    return blocks + _against_each_other(judged)


def _problems(run: Run) -> list[str]:
    found = [f"{problem}." for problem in run.problems]
    if run.evaluation is None:
        epochs = len(run.records("train"))
        found.append(
            f"{run.folder} was not evaluated ({epochs} of {run.config.epochs} epochs are in its log), and is missing "
            f"from the table."
        )
    return found


def _with_seeds(row: Row) -> str:
    return row.name if len(row.judged) == 1 else f"{row.name} ({len(row.judged)} seeds)"


def _right(run: Run, attack: str) -> tuple[int, int] | None:
    """(right, judged) images of an evaluated run; None if the attack was left away."""
    assert run.evaluation is not None
    summary = run.evaluation["summary"]
    pct = summary.get(f"{attack}_top1_pct")
    if pct is None:
        return None
    count = summary.get("grid_num_images", summary["num_images"]) if attack == "grid" else summary["num_images"]
    return round(pct * count / 100), count


def _accuracy(row: Row, attack: str) -> Interval | None:
    found = [_right(run, attack) for run in row.judged]
    shares = [right for right in found if right is not None]
    if not shares:
        return None
    return wilson(*shares[0]) if len(shares) == 1 else mean([right / count for right, count in shares])


def _published(row: Row) -> tuple[float, ...] | None:
    config = row.first.config
    degrees = 0.0 if config.mode in ("nocrop", "standard") else config.degrees
    return PUBLISHED.get((config.mode, degrees))


def _comparable(row: Row) -> bool:
    """Whether a row was judged as the published one was."""
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
    return _shown(None if ours is None else difference(ours, wilson(right, PUBLISHED_IMAGES)), signed=True)


def _against_each_other(judged: Sequence[Row]) -> list[Block]:
    """Every row less the standard one (or the first), on the same images."""
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
            lines.append([row.name, *(_shown(pairs[attack], signed=True) for attack in ATTACKS)])
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
    mine, theirs = ({image["path"]: image for image in r.evaluation.get("images", [])} for r in (run, base) if r.evaluation)
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
            gpu_hours = run.log[-1]["gpu_hours"] + gpus * (evaluate_sec or 0.0) / 3600
            kwh = [record["energy_kwh"] for record in run.log if "energy_kwh" in record]
            kwh_known, gpus_used = kwh_known or bool(kwh), gpus_used or gpus > 0
            total_gpu_hours += gpu_hours
            rates = [record["images_per_sec"] for record in run.records("train")]
            lines.append(
                [
                    row.name if len(row.runs) == 1 else f"{row.name}, seed {run.config.seed}",
                    str(gpus or _DASH),
                    _duration(train_sec),
                    _DASH if evaluate_sec is None else _duration(evaluate_sec),
                    f"{gpu_hours:.2f}" if gpus else _DASH,
                    f"{price * gpu_hours:.2f}" if gpus and price else _DASH,
                    f"{plain_statistics.median(rates):,.0f}" if rates else _DASH,
                    f"{sum(kwh):.3f}" if kwh else _DASH,
                ]
            )
    if not lines:
        return [Text("No run here has a log yet.")]
    head = ["trained as", "GPUs", "training", "evaluation", "GPU-hours", "price", "images/s", "kWh"]
    notes = ["Times are of the clock on the wall; images/s is the median epoch's, training alone."]
    if gpus_used:
        notes.append(
            f"All of it took {total_gpu_hours:.2f} GPU-hours, evaluations included"
            + (f", which come to {price * total_gpu_hours:.2f} at {price:g} each." if price else ".")
        )
        if not price:
            notes.append("No price was given (`--price`, of a GPU-hour), so none is shown.")
    else:
        notes.append("These runs used no GPU: there are no GPU-hours, and nothing to price.")
    if kwh_known:
        notes.append("kWh is what the GPUs used while training, by NVML's counters; the rest of the machine is not in it.")
    else:
        notes.append("No energy is in the logs: NVML gave none.")
    return [Table(head, lines), Text(" ".join(notes))]


def _gpus(run: Run) -> int:
    return int(run.starts[-1]["world_size"]) if run.starts and run.starts[-1].get("gpus") else 0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- learning


def learning(rows: Sequence[Row]) -> list[Block]:
    """Loss and accuracy over epochs."""
    wanted = (
        ("train", "loss", "Training loss, on the views trained on", "cross-entropy, nats"),
        ("train", "top1_pct", "Training accuracy, on the views trained on", "top-1 accuracy, %"),
        ("evaluation", "top1_pct", "Validation accuracy, untouched images", "top-1 accuracy, %"),
        ("evaluation", "attacked_top1_pct", "Validation accuracy under each row's training attack", "top-1 accuracy, %"),
    )
    figures = []
    for event, name, caption, y_label in wanted:
        series = []
        for style, row in enumerate(rows):
            for run in row.runs:
                points = [(r["epoch"], r[name]) for r in run.records(event) if r.get(name) is not None]
                if points:
                    series.append(Series(row.name, points, style))
        if series:
            figures.append(Figure(caption, line_chart(caption, "epoch", y_label, series)))
    if not figures:
        return [Text("No run here has finished an epoch.")]
    return [
        Text(
            "A line per run; seeds of one row look alike. Training numbers are of the weights as they changed during "
            "the epoch. Rows that train without warps have no training attack."
        ),
        Figures(figures),
    ]


# --- robustness


def robustness(rows: Sequence[Row]) -> list[Block]:
    """Accuracy against the limits of the attack."""
    mapped = [(style, row.name, row.mapped.landscape) for style, row in enumerate(rows) if row.mapped]
    found = [(style, name, landscape) for style, name, landscape in mapped if landscape is not None]
    if not found:
        return [Text(_no_landscape())]
    angle_steps, shift_steps = GRID_ANGLES // 2, GRID_SHIFTS // 2
    wanted: tuple[tuple[str, str, int, Callable[[int], tuple[int, int]], bool], ...] = (
        ("Right on every view: rotations alone", "angle", angle_steps, lambda step: (step, 0), True),
        ("Right on every view: translations alone", "shift", shift_steps, lambda step: (0, step), True),
        ("Right on every view: rotations, with all translations", "angle", angle_steps, lambda s: (s, shift_steps), True),
        ("Right on every view: translations, with all rotations", "shift", shift_steps, lambda s: (angle_steps, s), True),
        ("Mean over the views: rotations alone", "angle", angle_steps, lambda step: (step, 0), False),
        ("Mean over the views: translations alone", "shift", shift_steps, lambda step: (0, step), False),
    )
    figures = []
    for caption, kind, steps, limits_at, every in wanted:
        series = []
        for style, name, landscape in found:
            values = landscape.angles_deg if kind == "angle" else landscape.shifts_px
            limits = values[len(values) // 2 :]
            curve = [_over_views(landscape.within(*limits_at(step)), every=every) for step in range(steps + 1)]
            points = [(x, 100 * one.value) for x, one in zip(limits, curve)]
            series.append(Series(name, points, style, [(100 * one.low, 100 * one.high) for one in curve]))
        x_label = "angle limit, degrees" if kind == "angle" else "translation limit, px at side 224"
        chart = line_chart(caption, x_label, "top-1 accuracy, %", series, y_range=(0.0, 100.0))
        figures.append(Figure(caption, chart))
    head = ["trained as", "untouched", *(f"{a:g}°" for a in (10, 20, 30)), "12 px", "24 px", "30°, 24 px"]
    limits_of_columns = [(0, 0), (5, 0), (10, 0), (15, 0), (0, 1), (0, 2), (15, 2)]
    a_limit, t_limit = found[0][2].about["degrees"], found[0][2].about["translate_px"]
    head[2:] = [
        *(f"{a_limit * a / angle_steps:g}°" for a in (5, 10, 15)),
        *(f"{t_limit * t / shift_steps:.3g} px" for t in (1, 2)),
        f"{a_limit:g}°, {t_limit:.3g} px",
    ]
    lines = [
        [name, *(_shown(_over_views(landscape.within(*limits), every=True)) for limits in limits_of_columns)]
        for _, name, landscape in found
    ]
    return [
        Text(_subset(found[0][2])),
        Text(
            "An image counts as right within a limit if it is right on every view of the grid that stays within it, the "
            f"untouched one included; at both limits these are all {GRID_VIEWS} views. Bands are 95 % intervals: "
            "Wilson's, and Student's t for means over views. The subset has as many images of every class, so they are "
            "a little too wide."
        ),
        Figures(figures),
        Text("The same in numbers: percent of images that are right on every view up to a limit."),
        Table(head, lines),
    ]


def _over_views(correct: NDArray[np.bool_], *, every: bool) -> Interval:
    """Accuracy over images, [N, views]: right on every view, or the mean share of the views."""
    if every:
        return wilson(int(correct.all(axis=1).sum()), len(correct))
    found = mean(correct.mean(axis=1).tolist())
    return Interval(found.value, max(0.0, found.low), min(1.0, found.high))


def _subset(landscape: Landscape) -> str:
    about = landscape.about
    return (
        f"Survivors cannot tell how accuracy depends on the limits, so all {GRID_VIEWS} views of a fixed subset were "
        f"judged: {about['num_images']} validation images, {about['images_per_class']} of every class, drawn once for "
        f"all models and named in each run's `landscape.json`. Of several seeds, the first one's model is shown."
    )


def _no_landscape() -> str:
    return (
        "No run here has a landscape: `launch.py landscape --checkpoint RUN/best.pt --data DATA --out RUN` makes one, "
        "and `launch.py report` shows it."
    )


# --- landscape


def landscapes(rows: Sequence[Row]) -> list[Block]:
    """Loss and accuracy over angle and translation, of models and of single images."""
    found = [(row.name, run) for row in rows if (run := row.mapped) is not None]
    maps = [(name, run.landscape) for name, run in found if run.landscape is not None]
    if not maps:
        return [Text(_no_landscape())]
    losses = [landscape.loss.mean(axis=(0, 3)) for _, landscape in maps]
    loss_scale = _scale_of(losses, "mean cross-entropy, nats")
    percent = Scale(0.0, 100.0, "top-1 accuracy, %")
    model_figures = []
    for (name, landscape), loss in zip(maps, losses):
        for caption, values, scale in (
            (f"{name}: accuracy, mean over ty", 100 * landscape.correct.mean(axis=(0, 3)), percent),
            (f"{name}: right for all five ty", 100 * landscape.correct.all(axis=3).mean(axis=0), percent),
            (f"{name}: loss, mean over ty", loss, loss_scale),
        ):
            model_figures.append(Figure(caption, _model_map(caption, landscape, values.T, scale)))
    shown = [
        (name, landscape, sample["image"])
        for name, landscape in maps
        for sample in landscape.about["samples"][:: max(1, len(landscape.about["samples"]) // _MAPPED_IMAGES)][:_MAPPED_IMAGES]
    ]
    image_scale = _scale_of([landscape.loss[image] for _, landscape, image in shown], "cross-entropy, nats")
    image_figures = []
    for name, landscape, image in shown:
        about = landscape.about["images"][image]
        caption = f"{name}: `{about['path']}`, class {about['class']}"
        image_figures.append(Figure(caption, _image_map(caption, landscape, image, image_scale)))
    return [
        Text(_subset(maps[0][1])),
        Text(
            "Models: columns are the 31 angles, rows the 5 horizontal translations tx (a positive one moves the content "
            "to the left). Over the 5 vertical ones, ty, the first map takes the mean, the second demands that an image "
            "is right for all five, and the third shows the mean loss."
        ),
        Figures(model_figures),
        Text(
            f"Single images: all {GRID_VIEWS} views, none averaged. Rows are the 25 translations, ty from "
            f"{maps[0][1].shifts_px[0]:.3g} to {maps[0][1].shifts_px[-1]:.3g} px from top to bottom within each tx; a dot "
            f"marks a view that is judged wrong."
        ),
        Figures(image_figures),
    ]


def _scale_of(losses: Sequence[NDArray[np.float32]], label: str) -> Scale:
    """One scale for maps that are compared: up to the 98th percentile, rounded up to two digits."""
    values = np.concatenate([loss.ravel() for loss in losses])
    high = float(np.percentile(values, 98))
    digits = 10.0 ** (math.floor(math.log10(high)) - 1) if high > 0 else 1.0
    high = math.ceil(high / digits - 1e-9) * digits or 1.0
    return Scale(0.0, high, label, clipped=bool(values.max() > high))


def _angle_ticks(landscape: Landscape) -> list[tuple[float, str]]:
    return [(a, _signed(angle)) for a, angle in enumerate(landscape.angles_deg) if a % 5 == 0]


def _model_map(caption: str, landscape: Landscape, values: NDArray[np.float64], scale: Scale) -> str:
    ticks = [(row, _signed(shift)) for row, shift in enumerate(landscape.shifts_px)]
    return heat_map(
        caption,
        "angle, degrees",
        "tx, px at side 224",
        values.tolist(),
        scale,
        x_ticks=_angle_ticks(landscape),
        y_ticks=ticks,
        row_height=24,
    )


def _image_map(caption: str, landscape: Landscape, image: int, scale: Scale) -> str:
    # [31, tx, ty] to rows of (tx, ty).
    loss, correct = (
        values[image].transpose(1, 2, 0).reshape(-1, GRID_ANGLES) for values in (landscape.loss, landscape.correct)
    )
    middle = GRID_SHIFTS // 2
    return heat_map(
        caption,
        "angle, degrees",
        "tx, px at side 224 (ty within)",
        loss.tolist(),
        scale,
        x_ticks=_angle_ticks(landscape),
        y_ticks=[(row * GRID_SHIFTS + middle, _signed(shift)) for row, shift in enumerate(landscape.shifts_px)],
        row_height=7,
        marked=[(int(r), int(c)) for r, c in np.argwhere(~correct)],
        rows_per_group=GRID_SHIFTS,
    )


# --- worst views


def worst_views(rows: Sequence[Row]) -> list[Block]:
    """Sample images, untouched and as the view of highest loss."""
    blocks: list[Block] = []
    for row in rows:
        run = row.mapped
        if run is None or run.landscape is None:
            continue
        images = run.landscape.about["images"]
        cards = []
        for sample in run.landscape.about["samples"]:
            about = images[sample["image"]]
            pictures = [
                (run.folder / sample[kind], f"{about['path']}, {kind}{' view' if kind == 'worst' else ''}")
                for kind in ("untouched", "worst")
            ]
            if all(path.is_file() for path, _ in pictures):
                cards.append(Card(pictures, _worst_caption(about["class"], sample)))
        if cards:
            blocks.append(Pictures(row.name, cards))
    if not blocks:
        return [Text(f"There are no pictures. {_no_landscape()}")]
    about_them = (
        f"Images spread evenly over the subset, not chosen by their looks: untouched on the left, and on the right the "
        f"view of highest loss of all {GRID_VIEWS}."
    )
    return [Text(about_them), *blocks]


def _worst_caption(name: str, sample: dict[str, Any]) -> str:
    said = sample["worst_predicted"]
    verdict = f"class {name}, still right" if said == name else f"class {name}, taken for {said}"
    return (
        f"{verdict}; {_signed(sample['degrees'])}°, {_signed(sample['tx_px'])} and {_signed(sample['ty_px'])} px; "
        f"loss {sample['untouched_loss']:.2f} to {sample['worst_loss']:.2f}"
    )


# --- classes


def classes(rows: Sequence[Row]) -> list[Block]:
    """Accuracy and loss by class."""
    judged = [(row.name, run.judged[0]) for row in rows for run in [row] if run.judged]
    accuracy = {name: _by_class(run) for name, run in judged if run.evaluation and run.evaluation.get("images")}
    blocks: list[Block] = []
    if accuracy:
        counts = {c: n for found in accuracy.values() for c, (n, _, _) in found.items()}
        with_grid = [f[c][2] for f in accuracy.values() for c in f]
        hardest = sorted(
            counts,
            key=lambda c: sum((found[c][2] if found[c][2] is not None else found[c][1]) for found in accuracy.values() if c in found),
        )
        lines = [
            [c, str(counts[c]), *(_natural_and_grid(found.get(c)) for found in accuracy.values())]
            for c in _some(hardest, sorted(counts))
        ]
        grid = "right on every view of the grid" if any(v is not None for v in with_grid) else "under no other attack"
        blocks += [
            Text(
                f"Percent right, untouched and {grid}"
                + ("." if len(counts) <= _MANY_CLASSES else f": the ten hardest and the ten easiest of {len(counts)} classes.")
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
            [c, *(" / ".join(f"{v:.2f}" for v in found[c]) if c in found else _DASH for found in losses.values())]
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


def _by_class(run: Run) -> dict[str, tuple[int, float, float | None]]:
    """Images, percent right untouched, and percent that the grid leaves right, by class."""
    assert run.evaluation is not None
    verdicts: dict[str, list[tuple[bool, bool | None]]] = {}
    for image in run.evaluation["images"]:
        verdicts.setdefault(image["path"].split("/")[-2], []).append((image["natural"], image["grid"]))
    found: dict[str, tuple[int, float, float | None]] = {}
    for name, of_class in verdicts.items():
        grid = [g for _, g in of_class if g is not None]
        natural_pct = 100 * sum(n for n, _ in of_class) / len(of_class)
        found[name] = (len(of_class), natural_pct, 100 * sum(grid) / len(grid) if grid else None)
    return found


def _natural_and_grid(found: tuple[int, float, float | None] | None) -> str:
    if found is None:
        return _DASH
    _, natural, grid = found
    return f"{natural:.0f} / {_DASH if grid is None else f'{grid:.0f}'}"


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
    """What the recipe changed, and what is built in."""
    blocks: list[Block] = []
    changed = deviations.options({row.name: row.first.config for row in rows})
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
    """The command, and what it ran on."""
    runs = [run for row in rows for run in row.runs]
    starts = [start for run in runs for start in run.starts]
    commands = _distinct(start["command"] for start in starts if start.get("command"))
    blocks: list[Block] = [
        Code("\n".join(commands)) if commands else Text("The command is not known: nothing was started by launch.py.")
    ]
    if not starts:
        return [*blocks, Text("No run here has an `environment.jsonl`, so what it ran on is not known.")]
    continued = sum(len(run.starts) - 1 for run in runs if run.starts)
    if continued:
        blocks.append(Text(f"Runs were continued {continued} times; the same command continues one that was stopped."))

    def of(name: str) -> str:
        return "; ".join(_distinct(str(start[name]) for start in starts if start.get(name) not in (None, [], ""))) or _DASH

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
        ["commit", "; ".join(commits) or _DASH],
        ["started", _span(starts)],
    ]
    return [*blocks, Table(["ran on", ""], lines, text_columns=2)]


def _span(starts: Sequence[dict[str, Any]]) -> str:
    times = sorted(start["started"] for start in starts if start.get("started"))
    if not times:
        return _DASH
    return times[0] if len(times) == 1 else f"{times[0]} (the first), {times[-1]} (the last)"


# --- words


def _shown(interval: Interval | None, *, signed: bool = False) -> str:
    """Percent, and its limits in brackets."""
    if interval is None:
        return _DASH
    value, low, high = (100 * v for v in interval)
    if signed:
        return f"{_points(value)} [{_points(low)}, {_points(high)}]"
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _points(value: float) -> str:
    text = f"{abs(value):.1f}"
    return text if text == "0.0" else f"{'+' if value > 0 else '−'}{text}"


def _signed(value: float) -> str:
    text = f"{abs(value):.3g}"
    return text if value >= 0 else f"−{text}"


def _data(run: Run) -> str:
    return run.config.data.rstrip("/").split("/")[-1]


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
