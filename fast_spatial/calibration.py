"""How fast this machine trains, measured on a few steps; what a whole training costs, from that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping

import torch

from fast_spatial.config import TrainConfig
from fast_spatial.device import dtype_of, seed_everything
from fast_spatial.schedule import mean_over_rest
from fast_spatial.step import make_step
from pipelines.loader import Batch

# Of the images trained on in a measured step: a step of more is hardly faster for each of them.
MOST_PIXELS = {"cpu": 1 << 19, "cuda": 1 << 24}


def measure_steps(
    config: TrainConfig,
    device: torch.device,
    sides: Collection[int],
    *,
    num_classes: int,
    processes: int = 1,
    seconds: float = 1.0,
) -> dict[int, float]:
    """Images per second of one process in a training's steps, at each side; of random pixels, so without the loader.

    Args:
        config: the training: its mode, network and arithmetic; its weights start afresh.
        device: what computes.
        sides: of the views, pixels.
        num_classes: outputs of the network.
        processes: that share a batch.
        seconds: how long each side is timed, at the least, and for three steps; two steps before that are not.

    """
    seed_everything(config.seed, deterministic=config.deterministic)
    step = make_step(config, num_classes, device, dtype_of(config.dtype, device))
    found = {}
    for side in sides:
        batch = min(config.global_batch_size // processes, MOST_PIXELS[device.type] // side**2)
        labels = torch.arange(batch, device=device) % num_classes
        shape = (batch, len(config.view_limits()), side, side, 3)
        images = Batch(torch.randint(256, shape, dtype=torch.uint8, device=device), labels, torch.arange(batch))
        for _ in range(2):
            step(images)
        taken: list[float] = []
        while len(taken) < 3 or sum(taken) < seconds:
            _wait(device)
            start = time.perf_counter()
            step(images)
            _wait(device)
            taken.append(time.perf_counter() - start)
        found[side] = batch / statistics.median(taken)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_hours(config: TrainConfig, images: int, images_per_sec: Mapping[int, float]) -> float:
    """Hours that a training's steps take, from the rate at each of its sides; evaluations are not counted."""
    seconds_per_image = mean_over_rest(config, 0.0, {side: 1 / rate for side, rate in images_per_sec.items()})
    return config.epochs * images * seconds_per_image / 3600
