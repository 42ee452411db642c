"""Training one model: read `train` from top to bottom, one batch from the loader to the gradient."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from fast_spatial import checkpoint, distributed
from fast_spatial import model as models
from fast_spatial.attack import judge_views, losses_of, take_views, verdicts, worst_view
from fast_spatial.config import MODES, TrainConfig, to_json
from fast_spatial.data import load_split
from fast_spatial.distributed import World
from fast_spatial.memory import estimate
from fast_spatial.metrics import Tally
from fast_spatial.model import Classifier, to_unit
from fast_spatial.optim import lr_at, make_optimizer, set_lr
from fast_spatial.runlog import Bar, RunLog, say
from fast_spatial.scoring import Scorer
from kernels.cpus import cpus_per_process
from kernels.sampling import EVALUATION, TRAINING, augmentation_settings, pack_key, view_limits
from pipelines.loader import Batch, Loader

PROFILE_AFTER_STEPS = 10


class StepResult(NamedTuple):
    """Of one process's images [B]: the loss trained on, whether that view was correct, which view it was."""

    loss: Tensor
    correct: Tensor
    choice: Tensor


class TrainStep:
    """One step: judge the views, train on the worst, keep every process's BatchNorm and the scorer's weights in line.

    Args:
        model: the classifier, on its device.
        optimizer: over its parameters.
        dtype: float32 or a half precision for autocast; float16 brings a gradient scaler.
        scored: whether batches have several views to choose from.
        accumulate: parts of a batch trained on one after the other, as one step.
        score_chunk: views in one judging pass; 0 for all.

    """

    def __init__(
        self,
        model: Classifier,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: torch.dtype,
        scored: bool,
        accumulate: int = 1,
        score_chunk: int = 0,
    ) -> None:
        self.model, self.optimizer, self.dtype = model, optimizer, dtype
        self._accumulate, self._score_chunk = accumulate, score_chunk
        self._device = model.mean.device
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=dtype == torch.float16)
        self.scorer = Scorer(model, dtype) if scored else None
        self._parallel: nn.Module = model
        if torch.distributed.is_initialized():
            devices = [self._device.index] if self._device.type == "cuda" else None
            # Buffers are averaged after each step, not taken from rank 0 before the next; the option was renamed.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            keep_buffers: dict[str, Any] = {name: False}
            self._parallel = DistributedDataParallel(
                model, device_ids=devices, gradient_as_bucket_view=True, **keep_buffers
            )

    def __call__(self, batch: Batch) -> StepResult:
        self.model.train()
        with record_function("score"):
            choice = self._choose(batch)
            views = take_views(batch.views, choice)
        self.optimizer.zero_grad(set_to_none=True)
        losses, corrects = [], []
        parts = list(zip(views.tensor_split(self._accumulate), batch.labels.tensor_split(self._accumulate)))
        for number, (part, labels) in enumerate(parts):
            with self._sync(last=number == len(parts) - 1):
                with record_function("forward"), self._autocast():
                    logits = self._parallel(to_unit(part))
                    loss = cross_entropy(logits, labels, reduction="none")
                with record_function("backward"):
                    self.scaler.scale(loss.sum() / len(views)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            corrects.append(logits.detach().argmax(dim=1) == labels)
        with record_function("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            distributed.average_buffers(self.model)
            if self.scorer is not None:
                self.scorer.refresh()
        return StepResult(torch.cat(losses), torch.cat(corrects), choice)

    def _choose(self, batch: Batch) -> Tensor:
        if self.scorer is None:
            return torch.zeros_like(batch.labels)
        logits = judge_views(self.scorer, batch.views, self._score_chunk)
        return worst_view(losses_of(logits, batch.labels))

    def _autocast(self) -> Any:
        return torch.autocast(self._device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _sync(self, *, last: bool) -> Any:
        if last or not isinstance(self._parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._parallel.no_sync()


def train(config: TrainConfig, world: World) -> None:
    """Train a model as `config` says: `best.pt`, `last.pt`, `log.jsonl` and TensorBoard scalars in its folder."""
    # --- set up
    seed_everything(config.seed, deterministic=config.deterministic)
    out, mode = Path(config.out), MODES[config.mode]
    dtype = training_dtype(config.dtype, world.device)
    train_images = load_split(config.data, "train", classes=config.classes, max_images=config.max_train_images)
    val_images = load_split(config.data, "val", classes=config.classes)
    net = models.build(config.arch, len(train_images.classes))
    if config.bn_group:
        models.group_batch_norm(net, config.bn_group)
    model = Classifier(net).to(world.device)
    limits_V2 = config.view_limits()
    optimizer = make_optimizer(config, model)
    step = TrainStep(
        model,
        optimizer,
        dtype=dtype,
        scored=len(limits_V2) > 1,
        accumulate=config.accumulate,
        score_chunk=config.score_chunk or default_score_chunk(world.device, config.side),
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
    eval_warps = int((limits_V2 != 0).any(axis=1).sum())
    eval_loader = open_loader(
        val_images,
        limits=view_limits(
            eval_warps, untouched_first=True, degrees=config.limits.degrees, translate=config.limits.translate
        ),
        settings=augmentation_settings(center=True),
        key=pack_key(EVALUATION, 0),
        train=False,
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
    if not distributed.agree(first_epoch, world.device):
        raise ValueError(f"--out {out}: not every process finds the same checkpoint there; all nodes must share it")
    gpus = world.world_size if world.device.type == "cuda" else 0
    runlog = RunLog(out, rank=world.rank, gpus=gpus, elapsed_sec=elapsed_sec)
    if world.rank == 0:
        say(describe(config, world, dtype, len(train_images), len(val_images), len(train_images.classes)))

    # --- train
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
                    runlog.scalars("train", epoch * loader.steps_per_epoch + number, **means)
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
            scores = validate(step.scorer or Scorer(model, dtype), eval_loader, world, config)
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
                "optimizer": optimizer.state_dict(),
                "scaler": step.scaler.state_dict(),
            }
            checkpoint.save(out / "last.pt", payload)
            if improved:
                checkpoint.save(out / "best.pt", payload)
        distributed.progress(config.stall_minutes)
    runlog.close()
    distributed.barrier()


def validate(scorer: Scorer, loader: Loader, world: World, config: TrainConfig) -> dict[str, float | None]:
    """Natural top-1, top-5 and loss on the validation images, and accuracy under the training attack (None without)."""
    warps = int((config.view_limits() != 0).any(axis=1).sum())
    tally = Tally(world.device, "top1", "top5", "loss", "attacked")
    chunk = config.score_chunk or default_score_chunk(world.device, config.side)
    bar = Bar(
        loader.epoch(0),
        total=loader.steps_per_epoch,
        images_per_batch=config.global_batch_size,
        title="evaluate",
        show=world.rank == 0,
    )
    for batch in bar:
        found = verdicts(judge_views(scorer, batch.views, chunk), batch.labels)
        attacked = found.random if warps == 1 else found.worst
        tally.add(found.natural, found.natural_top5, found.natural_loss, attacked)
        distributed.progress(config.stall_minutes)
    means = tally.means(over_ranks=True)
    return {
        "top1_pct": 100 * means["top1"],
        "top5_pct": 100 * means["top5"],
        "loss": means["loss"],
        "attacked_top1_pct": 100 * means["attacked"] if warps else None,
    }


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic that an option means on a device; also sets whether float32 products may use TF32."""
    tf32 = "tf32" if name in ("auto", "tf32", "bfloat16", "float16") else "ieee"
    torch.backends.cuda.matmul.fp32_precision = tf32
    torch.backends.cudnn.conv.fp32_precision = tf32  # type: ignore[attr-defined]
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32 if name == "tf32" else getattr(torch, name)  # type: ignore[no-any-return]


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed the weights (the stream needs none) and choose between repeatable and fast kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(cpus_per_process())
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def default_score_chunk(device: torch.device, side: int) -> int:
    """Views in one judging pass: as many as a quarter of the free memory holds in ResNet-18's widest layers."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    per_view = 3 * 64 * (side / 2) ** 2 * 4 + 2 * 3 * side**2 * 4
    return max(1, min(int(free / 4 / per_view), 1 << 16 if device.type == "cuda" else 1024))


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
