"""Training one model: read `train` from top to bottom; `step.py` takes a batch from there to the gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fast_spatial import checkpoint, distributed
from fast_spatial import model as models
from fast_spatial.attack import verdicts
from fast_spatial.config import MODES, TrainConfig, to_json
from fast_spatial.data import load_split
from fast_spatial.device import default_pass_size, dtype_of, seed_everything
from fast_spatial.distributed import World
from fast_spatial.memory import estimate
from fast_spatial.metrics import Tally
from fast_spatial.model import Classifier
from fast_spatial.optim import lr_at, make_optimizer, set_lr
from fast_spatial.runlog import Bar, RunLog, say
from fast_spatial.scoring import Passes, Scorer
from fast_spatial.step import TrainStep
from kernels.sampling import EVALUATION, TRAINING, augmentation_settings, pack_key, view_limits
from pipelines.loader import Batch, Loader

PROFILE_AFTER_STEPS = 10


def train(config: TrainConfig, world: World) -> None:
    """Train a model as `config` says: `best.pt`, `last.pt`, `log.jsonl` and TensorBoard scalars in its folder."""
    # --- set up
    seed_everything(config.seed, deterministic=config.deterministic)
    out, mode = Path(config.out), MODES[config.mode]
    dtype = dtype_of(config.dtype, world.device)
    load = partial(load_split, config.data, exclude=config.exclude, classes=config.classes)
    train_images, val_images = load("train", max_images=config.max_train_images), load("val")
    net = models.build(config.arch, len(train_images.classes))
    if config.bn_group:
        models.group_batch_norm(net, config.bn_group)
    model = Classifier(net).to(world.device)
    limits_V2 = config.view_limits()
    eval_warps = int((limits_V2 != 0).any(axis=1).sum())
    score_chunk = config.score_chunk or default_pass_size(world.device, config.score_side or config.side)
    compiled = config.compile == "true" or (config.compile == "auto" and world.device.type == "cuda")
    compiled = compiled and not config.deterministic
    optimizer = make_optimizer(config, model)
    step = TrainStep(
        model,
        optimizer,
        dtype=dtype,
        scored=len(limits_V2) > 1,
        accumulate=config.accumulate,
        score_chunk=score_chunk,
        score_side=config.score_side,
        compiled=compiled,
    )
    judge = step.scorer or Scorer(model, dtype)
    # Of the training passes' shape, or a compiled network would be compiled again.
    eval_pass = config.score_chunk or default_pass_size(world.device, config.side)
    eval_passes = Passes(
        judge, eval_pass or config.global_batch_size // world.world_size * len(limits_V2), pad=compiled
    )
    settings = augmentation_settings(
        center=mode.center,
        scale=config.crop_scale,
        ratio=config.crop_ratio,
        flip_prob=config.flip_prob,
        jitter=config.jitter,
        lighting_std=config.lighting,
    )
    open_loader = partial(
        Loader,
        side=config.side,
        global_batch_size=config.global_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        threads=config.workers or None,
        device=world.device,
    )
    loader = open_loader(
        train_images,
        limits=limits_V2,
        settings=settings,
        key=pack_key(TRAINING, config.seed),
        train=True,
        exact_decoding=config.deterministic,
    )
    # Judged as the mode trains: nothing but the untouched image, one random view, or the worst of all.
    eval_loader = open_loader(
        val_images,
        limits=view_limits(
            eval_warps, untouched_first=True, degrees=config.limits.degrees, translate=config.limits.translate
        ),
        settings=augmentation_settings(center=True),
        key=pack_key(EVALUATION, 0),
        train=False,
    )

    if 0 < loader.steps_per_epoch < PROFILE_AFTER_STEPS + config.profile and config.profile:
        raise ValueError(
            f"--profile {config.profile}: it starts after {PROFILE_AFTER_STEPS} steps, and an epoch has only "
            f"{loader.steps_per_epoch}; lower --global-batch-size"
        )

    # --- resume
    first_epoch, best_pct, elapsed_sec = 0, -1.0, 0.0
    if (out / "last.pt").is_file():
        saved = checkpoint.load(out / "last.pt")
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step.scaler.load_state_dict(saved["scaler"])
        first_epoch, best_pct, elapsed_sec = saved["epoch"], saved["best_pct"], saved["elapsed_sec"]
        if step.scorer is not None:
            step.scorer.refresh()
        if saved["dtype"] != str(dtype) and world.rank == 0:
            say(f"continued in {dtype} instead of {saved['dtype']}, which this machine is best at")
        if saved["world_size"] != world.world_size and not config.bn_group and world.rank == 0:
            say(
                f"continued on {world.world_size} processes instead of {saved['world_size']}: BatchNorm normalizes "
                f"over batches of another size from here on (--bn-group fixes their size)"
            )
    if not distributed.agree(first_epoch, world.device):
        raise ValueError(f"--out {out}: not every process finds the same checkpoint there; all nodes must share it")
    gpus = world.world_size if world.device.type == "cuda" else 0
    runlog = RunLog(out, rank=world.rank, gpus=gpus, elapsed_sec=elapsed_sec)
    if world.rank == 0:
        for left_out in filter(None, (train_images.describe_left_out(), val_images.describe_left_out())):
            say(left_out)
        say(describe(config, world, dtype, len(train_images), len(val_images), len(train_images.classes)))

    # --- train
    evaluations = 0
    for epoch in range(first_epoch, config.epochs):
        set_lr(optimizer, lr_at(config, epoch))
        tally = Tally(world.device, "loss", "top1")
        bar = Bar(
            loader.epoch(epoch),
            total=loader.steps_per_epoch,
            images_per_batch=config.global_batch_size,
            title=f"epoch {epoch + 1}/{config.epochs}",
            show=world.rank == 0,
        )
        with profile(config.profile if epoch == first_epoch and world.rank == 0 else 0, out) as profiler:
            for number, batch in enumerate(bar):
                result = step(batch)
                tally.add(result.loss, result.correct)
                distributed.progress(config.stall_minutes)
                if number % config.log_every == config.log_every - 1 and world.rank == 0:
                    means = tally.means(over_ranks=False)
                    bar.show(loss=means["loss"], top1_pct=100 * means["top1"])
                    runlog.scalars("train_step", epoch * loader.steps_per_epoch + number, **means)
                if profiler is not None:
                    profiler.step()
        means = tally.means(over_ranks=True)
        runlog.record(
            "train",
            (epoch + 1) * loader.steps_per_epoch,
            epoch=epoch + 1,
            loss=means["loss"],
            top1_pct=100 * means["top1"],
            lr=lr_at(config, epoch),
            images_per_sec=round(bar.images_per_sec, 1),
            data_wait_pct=round(bar.data_wait_pct, 1),
        )

        # --- evaluate
        last = epoch + 1 == config.epochs
        improved = False
        if last or (config.eval_every and (epoch + 1) % config.eval_every == 0):
            before = runlog.elapsed_sec
            judge.refresh()
            batches = eval_loader.epoch(evaluations)
            evaluations += 1
            bar = Bar(
                batches,
                total=eval_loader.steps_per_epoch,
                images_per_batch=config.global_batch_size,
                title="evaluate",
                show=world.rank == 0,
            )
            scores = validate(
                eval_passes,
                bar,
                warps=eval_warps,
                device=world.device,
                moved=lambda: distributed.progress(config.stall_minutes),
            )
            runlog.record(
                "evaluation",
                (epoch + 1) * loader.steps_per_epoch,
                epoch=epoch + 1,
                **scores,
                cost_pct=round(100 * (runlog.elapsed_sec - before) / max(runlog.elapsed_sec, 1e-9), 1),
            )
            chosen = scores["attacked_top1_pct"] if scores["attacked_top1_pct"] is not None else scores["top1_pct"]
            assert chosen is not None
            improved, best_pct = chosen > best_pct, max(chosen, best_pct)

        # --- save
        if world.rank == 0:
            payload = {
                "format": checkpoint.FORMAT,
                "model": net.state_dict(),
                "arch": config.arch,
                "classes": list(train_images.classes),
                "config": to_json(config),
                "epoch": epoch + 1,
                "best_pct": best_pct,
                "elapsed_sec": runlog.elapsed_sec,
                "world_size": world.world_size,
                "dtype": str(dtype),
                "optimizer": optimizer.state_dict(),
                "scaler": step.scaler.state_dict(),
            }
            if improved:  # before last.pt: a run continues from there, and would not judge this epoch again
                checkpoint.save(out / "best.pt", payload)
            checkpoint.save(out / "last.pt", payload)
        distributed.progress(config.stall_minutes)
    runlog.close()
    distributed.barrier()


def validate(
    passes: Passes,
    batches: Iterable[Batch],
    *,
    warps: int,
    device: torch.device,
    moved: Callable[[], None],
) -> dict[str, float | None]:
    """Natural top-1, top-5 and loss on the validation images, and accuracy under the training attack (None without).

    The batches' views are the untouched image and `warps` random ones; `moved` is called after every batch.
    """
    tally = Tally(device, "top1", "top5", "loss", "attacked")
    for batch in batches:
        found = verdicts(passes(batch.views), batch.labels)
        tally.add(found.natural, found.natural_top5, found.natural_loss, found.random if warps == 1 else found.worst)
        moved()
    means = tally.means(over_ranks=True)
    return {
        "top1_pct": 100 * means["top1"],
        "top5_pct": 100 * means["top5"],
        "loss": means["loss"],
        "attacked_top1_pct": 100 * means["attacked"] if warps else None,
    }


def describe(
    config: TrainConfig, world: World, dtype: torch.dtype, train_images: int, val_images: int, classes: int
) -> str:
    """Two lines on what is about to run, memory included."""
    batch = config.global_batch_size // world.world_size
    views = len(config.view_limits())
    need = estimate(config.arch, classes, config.side, batch, config.accumulate, views, dtype != torch.float32)
    where = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    lines = [
        f"train {config.mode}: {config.arch}, {classes} classes, {train_images} training and {val_images} validation "
        f"images, {config.epochs} epochs, batch {config.global_batch_size} = {world.world_size} x {batch} on {where}, "
        f"{str(dtype).removeprefix('torch.')}",
        f"memory per process, estimated: {need.total_gib:.1f} GiB (weights {need.weights_gib:.1f}, activations "
        f"{need.activations_gib:.1f}, views {need.views_gib:.1f})",
    ]
    if world.device.type == "cuda":
        free_gib = torch.cuda.mem_get_info(world.device)[0] / (1 << 30)
        if need.total_gib > free_gib:
            lines.append(
                f"this GPU has {free_gib:.1f} GiB free: if it runs out, add --accumulate {2 * config.accumulate}"
            )
    return "\n".join(lines)


@contextlib.contextmanager
def profile(steps: int, out: Path) -> Any:
    """A trace of `steps` steps after the tenth, as OUT/profile.json; yields the profiler, or None for no steps."""
    if not steps:
        yield None
        return
    schedule = torch.profiler.schedule(wait=PROFILE_AFTER_STEPS - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(out / "profile.json"))
    ) as profiler:
        yield profiler
