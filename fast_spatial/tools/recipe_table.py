"""What `launch.py recipes` prints: the recipes, what is different in each, and what each costs on this machine."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch

from fast_spatial import preflight
from fast_spatial.config import recipes
from fast_spatial.config.commands import RecipesConfig
from fast_spatial.config.modes import DIGITS
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.images import data_folder
from fast_spatial.pipelines.dataset import count_images, list_classes
from fast_spatial.training.calibration import measure_steps, training_hours
from fast_spatial.training.schedule import side_starts

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
MODES = ("standard", "random", "worst10")
# Keys that the table has a column for.
_SHOWN = {"epochs", "global_batch_size", "lr", "side", "start_side"}


def list_recipes(config: RecipesConfig) -> str:
    """The recipes for these data, and their cost, measured now."""
    images, classes = IMAGENET_IMAGES, IMAGENET_CLASSES
    if config.data:
        folder = data_folder(config.data)
        names = list_classes(folder, "train")
        images, classes = count_images(folder, "train", names, at_most=sys.maxsize), len(names)
    gpus = preflight.gpu_count()
    trainings = {
        name: [
            recipes.train_config({"data": config.data or "data", "out": "out", "mode": mode, "recipe": name})
            for mode in MODES
        ]
        for name in recipes.names()
        if name.startswith(DIGITS) == (config.data == DIGITS)
    }
    rates = _rates([training for of in trainings.values() for training in of], classes, gpus, config.seconds)
    rows = [["recipe", "epochs", "batch", "lr", "side", *MODES, "otherwise than the reference"]]
    for name, of in trainings.items():
        hours = [training_hours(training, images, rates[_kind(training, gpus)]) / max(1, gpus) for training in of]
        sides = "-".join(str(side) for _, side in side_starts(of[0]))
        row = [name, str(of[0].epochs), str(of[0].global_batch_size), f"{of[0].lr:g}", sides]
        rows.append([*row, *map(_duration, hours), _differences(name)])
    where = f"{gpus} GPUs, {gpus} times the rate of one" if gpus > 1 else "one GPU" if gpus else "this machine's CPUs"
    lines = [
        *_aligned(rows),
        "",
        f"{', '.join(MODES)}: time to train on {images:,} images ({config.data or 'ImageNet'}) on {where},",
        "extrapolated from a few steps of random pixels, on CPUs smaller than the recipe's: without decoding and "
        "evaluations.",
    ]
    if config.data != DIGITS:
        lines += _orientation()
    return "\n".join(lines)


def _rates(
    trainings: Sequence[TrainConfig], classes: int, gpus: int, seconds: float
) -> dict[tuple[object, ...], dict[int, float]]:
    """Images per second of one process at each side, by kind of step."""
    kinds: dict[tuple[object, ...], list[TrainConfig]] = {}
    for training in trainings:
        kinds.setdefault(_kind(training, gpus), []).append(training)
    return {
        kind: measure_steps(
            alike[0],
            torch.device("cuda" if gpus else "cpu"),
            sorted({side for training in alike for _, side in side_starts(training)}),
            num_classes=classes,
            processes=max(1, gpus),
            seconds=seconds,
        )
        for kind, alike in kinds.items()
    }


def _kind(config: TrainConfig, gpus: int) -> tuple[object, ...]:
    """What decides how long a step takes, but for the side."""
    views = len(config.view_limits())
    return views, config.arch, config.bn_group, config.blurpool, config.global_batch_size // max(1, gpus)


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.2g} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.0f} days"


def _differences(name: str) -> str:
    """What a recipe changes in the defaults, but for what has a column."""
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    changed = {key: value for key, value in recipes.load(name).items() if value != defaults[key]}
    return ", ".join(f"{key} {_shown(value)}" for key, value in changed.items() if key not in _SHOWN) or "-"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def _orientation() -> list[str]:
    """What others reached in the ladder's style."""
    runs = recipes.PUBLISHED_LADDER.items()
    figures = (f"{epochs} epochs {run.top1_pct:.1f} % in {run.minutes:.0f} min" for epochs, run in runs)
    return [
        "",
        "The ladder has not been trained on ImageNet by this project. Natural accuracy published elsewhere:",
        f"  {', '.join(figures)};",
        f"  {recipes.PUBLISHED_CONDITIONS}.",
        "Without BlurPool, and judged at 224 px without flips as published, expect less: these are upper bounds.",
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
