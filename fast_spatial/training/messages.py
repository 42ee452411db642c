"""Messages of a training run: summary, resume, early stop and divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.models.memory import estimate
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.run_files import LAST, PREVIOUS
from fast_spatial.training.schedule import Segment


def describe(
    config: TrainConfig,
    world: World,
    dtype: torch.dtype,
    train_images: int,
    val_images: int,
    classes: int,
    epochs: str,
) -> str:
    """The summary printed before training: model, data, batch and estimated memory."""
    batch = config.global_batch_size // world.world_size
    views = config.num_views
    need = estimate(
        config.arch, classes, config.image_size, batch, config.grad_accum_steps, views, dtype != torch.float32
    )
    where = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    recipe = f", recipe {config.recipe}" if config.recipe else ""
    lines = [
        f"train {config.mode}{recipe}: {config.arch}, {classes} classes, {train_images} training and {val_images} "
        f"validation images, {epochs}, batch {config.global_batch_size} = {world.world_size} x {batch} "
        f"on {where}, {str(dtype).removeprefix('torch.')}",
        f"memory per process, estimated: {need.total_gib:.1f} GiB (weights {need.weights_gib:.1f}, activations "
        f"{need.activations_gib:.1f}, views {need.views_gib:.1f})",
    ]
    if config.blurpool:
        lines.append("--blurpool changes the network: its robustness is not comparable with the published models")
    if world.device.type == "cuda":
        free_gib = torch.cuda.mem_get_info(world.device)[0] / (1 << 30)
        if need.total_gib > free_gib:
            lines.append(
                f"this GPU has {free_gib:.1f} GiB free: if memory runs out, add --grad-accum-steps "
                f"{2 * config.grad_accum_steps}"
            )
    return "\n".join(lines)


def describe_resume(saved: dict[str, Any], config: TrainConfig, world: World, done: int, *, finished: bool) -> str:
    """The message of a resumed run: its position, and what differs from the saved run."""
    lines = [f"resumed after {done} steps (epoch {saved['epoch'] + 1})"]
    if finished:
        lines = ["this run is finished"]
    elif saved["world_size"] != world.world_size:
        same = "images and augmentations are unchanged"
        lines.append(f"on {world.world_size} processes instead of {saved['world_size']}: {same}")
        if not config.bn_group_size:
            lines.append("BatchNorm now normalizes over batches of another size (--bn-group-size fixes the size)")
    return "\n".join(lines)


def time_was_up(segment: Segment) -> str:
    """The message of a training stopped by its deadline before its schedule ended."""
    return (
        f"out of time after {segment.start} steps ({100 * segment.progress:.0f} % of the schedule); "
        f"evaluating the model as it is"
    )


def diverged(step: int, steps_per_epoch: int, out: Path) -> UserError:
    """The error for a loss or weights that became NaN or inf."""
    kept = next((f"; last good checkpoint: {out / name}" for name in (LAST, PREVIOUS) if (out / name).is_file()), "")
    return UserError(
        f"training diverged: loss or weights became NaN or inf at step {step} "
        f"(epoch {(step - 1) // steps_per_epoch + 1}){kept}",
        "lower --lr or use --dtype float32, in a new --out",
    )
