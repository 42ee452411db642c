"""Calibration: measures the throughput of training and evaluation on this machine, with all processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fast_spatial.config.commands import CalibrateConfig, EvaluateConfig
from fast_spatial.config.fields import from_json, identity
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.images import load_split
from fast_spatial.data.loading import evaluation_loader, training_loader
from fast_spatial.data.placing import placement_of
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward, default_judge_batch
from fast_spatial.evaluation.validation import Validation
from fast_spatial.kernels.limits import GRID_VIEWS, SpatialLimits
from fast_spatial.kernels.sampling import Views, draw_warps
from fast_spatial.kernels.spatial import grid, matrices
from fast_spatial.models import classifier
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.dataset import ImageIndex
from fast_spatial.pipelines.loader import Batch, Loader
from fast_spatial.runtime import distributed
from fast_spatial.runtime.device import dtype_of, seed_everything, synchronized_time
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.files import write_json
from fast_spatial.training.optim import set_lr
from fast_spatial.training.step import TrainStep, make_step

# Pixels per process in a measured step: larger batches hardly raise the throughput.
MOST_PIXELS = {"cpu": 1 << 19, "cuda": 1 << 24}
# The first steps at an image size, which are cold.
_COLD_STEPS = 3


class Rate(NamedTuple):
    """A measured rate, and the seconds that the first passes take beyond it.

    First passes build pipelines and twins, load and compile kernels, and choose algorithms.
    """

    per_sec: float
    cold_sec: float


def calibrate(config: CalibrateConfig, world: World, until: float) -> None:
    """Measure training and evaluation with all processes; rank 0 writes the results as JSON.

    The evaluation comes first: it then starts as cold as in a process of its own.

    Keys:
        trainings: one record per training: `images_per_sec` by image size, and `validation_images_per_sec`.
        training_cold_sec: seconds that the first passes of a training and its validation take beyond these rates;
            the largest of all trainings.
        views_per_sec: warped and classified in float32.
        judging_cold_sec: seconds that the first passes of an evaluation take beyond this rate.
        images, val_images, classes, gpus: counts.
        val_images_of_a_class: validation images in the smallest class.
        busy_sec: seconds of measuring and of probing decoders.
        left_sec: seconds left until `until`, a `time.monotonic()` value of rank 0's machine.
    """
    trainings = [from_json(TrainConfig, values) for values in config.trainings]
    first = trainings[0]
    images = load_split(
        first.data, "train", exclude=first.exclude, classes=first.max_classes, max_images=first.max_train_images
    )
    val_images = load_split(first.data, "val", exclude=first.exclude, classes=first.max_classes)
    start = time.monotonic()
    _compile_operators()
    judged = measure_judging(first, val_images, world, seconds=config.seconds)
    found: dict[str, dict[str, Any]] = {}
    cold_sec = 0.0
    for training in trainings:
        if _kind(training) in found:
            continue
        rates = measure_training(training, images, world, config.sides, seconds=config.seconds)
        validated = measure_validation(training, val_images, world)
        found[_kind(training)] = {
            "images_per_sec": {side: rate.per_sec for side, rate in rates.items()},
            "validation_images_per_sec": validated.per_sec,
        }
        cold_sec = max(cold_sec, sum(rate.cold_sec for rate in (*rates.values(), validated)))
        distributed.reset_watchdog(config.stall_minutes)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()  # the next network has other tensor shapes
    distributed.barrier()
    if world.rank == 0:
        content: dict[str, Any] = {
            "trainings": [found[_kind(training)] for training in trainings],
            "training_cold_sec": cold_sec,
            "views_per_sec": judged.per_sec,
            "judging_cold_sec": judged.cold_sec,
            "images": len(images),
            "val_images": len(val_images),
            "classes": len(images.classes),
            "val_images_of_a_class": int(val_images.class_counts().min()),
            "gpus": world.world_size if world.device.type == "cuda" else 0,
            "busy_sec": time.monotonic() - start + world.probe_sec,
            "left_sec": until - time.monotonic(),
        }
        write_json(Path(config.json), content)


def _compile_operators() -> None:
    """Compile the pipelines' operators and the draws, which are cached on disk: once per machine, not in the plan."""
    import fast_spatial.pipelines.graph  # noqa: F401

    none = np.empty(0, np.int64)
    draw_warps(0, 0, none, none, Views(1))


def measure_training(
    config: TrainConfig, images: ImageIndex, world: World, sides: Collection[int], *, seconds: float
) -> dict[int, Rate]:
    """Loading and training at each image size, in images per second over all processes.

    Batches are capped by `MOST_PIXELS`. The learning rate is 0, so weights do not change. Five untimed steps come
    first: they use up the prefetched batches. Three of them are cold. The first size's cold seconds build the network.

    Args:
        config: the training to measure.
        images: its training split.
        world: this process and its group.
        sides: image sizes, pixels.
        seconds: minimum time measured per image size; at least four steps are timed.

    """
    begun = time.perf_counter()
    seed_everything(config.seed, deterministic=config.deterministic)
    step = make_step(config, len(images.classes), world.device, dtype_of(config.dtype, world.device))
    set_lr(step.optimizer, 0.0)
    found = {}
    for side in sides:
        batch = world.world_size * _images_per_process(config, world, side)
        batches = _endless(training_loader(config, images, world, side=side, global_batch_size=batch))
        _take_steps(step, batches, _COLD_STEPS, world.device)
        first_sec = time.perf_counter() - begun
        estimate_sec = _take_steps(step, batches, 2, world.device) / 2
        count = distributed.broadcast(max(4, math.ceil(seconds / estimate_sec)), world.device)
        step_sec = _take_steps(step, batches, count, world.device) / count
        found[side] = Rate(batch / step_sec, max(0.0, first_sec - _COLD_STEPS * step_sec))
        begun = time.perf_counter()
    return found


def _take_steps(step: TrainStep, batches: Iterator[Batch], count: int, device: torch.device) -> float:
    """Seconds of a number of steps."""
    start = synchronized_time(device)
    for batch in itertools.islice(batches, count):
        step(batch)
    return synchronized_time(device) - start


def measure_validation(config: TrainConfig, images: ImageIndex, world: World) -> Rate:
    """The validation between epochs on a random subset, in images per second over all processes."""
    device = world.device
    dtype = dtype_of(config.dtype, device)
    count = min(
        len(images), world.world_size * _images_per_process(config, world, config.eval_size or config.image_size)
    )
    part = images.random_subset(count)
    judge = FoldedJudge(Classifier(classifier.build(config.arch, len(images.classes))).to(device), dtype)
    validate = Validation(
        dataclasses.replace(
            config, global_batch_size=max(world.world_size, count // world.world_size * world.world_size)
        ),
        world,
        part,
        judge,
    )
    took_sec = []
    for _ in range(2):
        start = synchronized_time(device)
        validate(lambda: None)
        took_sec.append(synchronized_time(device) - start)
    first_sec, warm_sec = took_sec
    return Rate(count / warm_sec, max(0.0, first_sec - warm_sec))


def measure_judging(config: TrainConfig, images: ImageIndex, world: World, *, seconds: float) -> Rate:
    """Warping and classifying in float32, in views per second over all processes.

    The cold seconds are those until the first pass, as an evaluation begins: the twin, the first batch, and the pass.
    """
    start = time.perf_counter()
    device = world.device
    seed_everything(0, deterministic=False)
    torch.backends.cudnn.benchmark = False  # as in an evaluation
    dtype = dtype_of("float32", device)
    side = config.eval_size or config.image_size
    size = default_judge_batch(device, side)
    passes = BatchedForward(
        FoldedJudge(Classifier(classifier.build(config.arch, len(images.classes))).to(device), dtype), size, pad=True
    )
    loader = evaluation_loader(
        images,
        world,
        side=side,
        batch_size_per_process=EvaluateConfig.batch_size_per_process,
        warps=EvaluateConfig.views,
        limits=config.limits,
        threads=config.workers,
        placement=placement_of(config, world, exact=True),
    )
    next(iter(loader.epoch(0)), None)  # None: more processes than images
    matrices_G23 = torch.from_numpy(matrices(grid(SpatialLimits.from_px(30.0)), side)).to(device)
    views = matrices_G23[torch.arange(size, device=device) % GRID_VIEWS][None]
    image = torch.randint(256, (1, side, side, 3), dtype=torch.uint8, device=device)
    passes.warped(image, views)
    warm, took_sec, judged = synchronized_time(device), 0.0, 0
    while judged < 3 * size or took_sec < seconds:
        passes.warped(image, views)
        judged += size
        took_sec = synchronized_time(device) - warm
    return Rate(world.world_size * judged / took_sec, max(0.0, warm - start - took_sec * size / judged))


def _images_per_process(config: TrainConfig, world: World, side: int) -> int:
    """Images per process in a measured step: its share of the batch, capped by `MOST_PIXELS`."""
    of_training = config.global_batch_size // world.world_size
    unit = config.grad_accum_steps * max(1, config.bn_group_size)
    return min(of_training, max(unit, MOST_PIXELS[world.device.type] // side**2 // unit * unit))


def _kind(config: TrainConfig) -> str:
    """A key of the options that affect the speed: the identity without warp limits and seed."""
    values = {**identity(config), "degrees": None, "translate_px": None, "seed": None}
    return json.dumps(values)


def _endless(loader: Loader) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from loader.epoch(epoch)
