"""Training one model: read `train` from top to bottom; `step.py` takes a batch from there to the gradient."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from fast_spatial import checkpoint, distributed
from fast_spatial import model as models
from fast_spatial.attack import verdicts
from fast_spatial.bad_images import BadImages
from fast_spatial.config import MODES, TrainConfig, identity, to_json
from fast_spatial.data import load_split
from fast_spatial.device import default_pass_size, dtype_of, seed_everything, seed_step
from fast_spatial.distributed import Ballot, World
from fast_spatial.environment import COMMAND_VARIABLE, environment
from fast_spatial.files import write_json
from fast_spatial.memory import estimate
from fast_spatial.metrics import Divergence, EachOnce, Tally
from fast_spatial.model import Classifier
from fast_spatial.optim import lr_at, make_optimizer, set_lr
from fast_spatial.runlog import Bar, RunLog, say
from fast_spatial.saving import CONFIG, LAST, PREVIOUS, Interval, Saver, find_latest
from fast_spatial.scoring import Passes, Scorer
from fast_spatial.step import TrainStep
from fast_spatial.stopping import Stopped, StopRequest, stop_requests
from kernels.sampling import EVALUATION, TRAINING, augmentation_settings, pack_key, view_limits
from pipelines.dataset import some
from pipelines.loader import Batch, Loader

PROFILE_AFTER_STEPS = 10


def train(config: TrainConfig, world: World) -> None:
    """Train a model as `config` says: `best.pt`, `last.pt`, `log.jsonl` and TensorBoard scalars in its folder.

    Raises:
        Stopped: if the process was asked to by a signal; the run is saved, and can be continued.
        ValueError: if the folder holds another run, cannot be written, or the loss stops being a number.

    """
    with stop_requests() as request, contextlib.ExitStack() as opened:
        try:
            _train(config, world, request, opened)
        except ValueError as error:
            if request.signal_number or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
                say(f"{error}")  # the launcher tells only of what ends it
            raise


def _train(config: TrainConfig, world: World, request: StopRequest, opened: contextlib.ExitStack) -> None:
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
    bad_images = BadImages(
        out, world.rank, train_images, skip=config.on_bad_image == "skip", at_most=config.max_bad_images
    )
    loader = open_loader(
        train_images,
        limits=limits_V2,
        settings=settings,
        key=pack_key(TRAINING, config.seed),
        train=True,
        exact_decoding=config.deterministic,
        on_bad_images=bad_images.met,
        bad_images=bad_images.positions(),
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
    gpus = world.world_size if world.device.type == "cuda" else 0
    runlog = opened.enter_context(contextlib.closing(RunLog(out, rank=world.rank, gpus=gpus)))
    saver = opened.enter_context(contextlib.closing(Saver(out))) if world.rank == 0 else None
    distributed.barrier()  # the folder is ours, and nobody writes there: now all may read
    saved, damaged = find_latest(out)
    same = {
        "recipe": identity(config),
        "dtype": str(dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype,
        "training images": train_images.fingerprint(),
        "validation images": val_images.fingerprint(),
    }
    first_epoch = first_step = 0
    best_pct = -1.0
    if saved is not None:
        check_same_run(saved["identity"], same, config)
        checkpoint.set_weights(net, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step.scaler.load_state_dict(saved["scaler"])
        first_epoch, first_step, best_pct = saved["epoch"], saved["step"], saved["best_pct"]
        if step.scorer is not None:
            step.scorer.refresh()
    done = first_epoch * loader.steps_per_epoch + first_step
    check_processes_agree(world, {"position": done, **same, "rhythm": [config.log_every, config.eval_every]})
    if saved is None:
        runlog.begin()
    else:
        runlog.begin(elapsed_sec=saved["elapsed_sec"], size=saved["log_size"], step=done)
    if world.rank == 0:
        write_json(out / CONFIG, to_json(config))
        record_environment(out, config, world, done)
        for path in damaged:
            say(f"{path} is damaged: continuing from {PREVIOUS}, which was saved before")
        for left_out in filter(None, (train_images.describe_left_out(), val_images.describe_left_out())):
            say(left_out)
        say(describe(config, world, dtype, len(train_images), len(val_images), len(train_images.classes)))
        if saved is not None:
            say(describe_resume(saved, config, world, done))
    if saver is not None:
        saver.set_aside(damaged)

    # --- what happens between steps
    ballot, divergence = Ballot(), Divergence(world.device)
    due = Interval(config.checkpoint_steps if world.rank == 0 else 0, config.checkpoint_sec if world.rank == 0 else 0)

    def check_finite() -> None:
        first = divergence.first_step()
        if first is not None:
            raise ValueError(diverged(first, loader.steps_per_epoch, out))

    def save(epoch: int, step_of_epoch: int, tally: Tally | None = None, *, best: bool = False) -> None:
        """Save the position: so many steps of an epoch are done; all of them: but for its evaluation."""
        divergence.note(done, *net.parameters(), *(b for b in net.buffers() if b.is_floating_point()))
        check_finite()
        sums = None if tally is None else tally.state()
        if saver is None:
            return
        saver.save(
            {
                "format": checkpoint.FORMAT,
                "model": net.state_dict(),
                "arch": config.arch,
                "classes": list(train_images.classes),
                "config": to_json(config),
                "epoch": epoch,
                "step": step_of_epoch,
                "tally": sums,
                "best_pct": best_pct,
                "elapsed_sec": runlog.elapsed_sec,
                "log_size": runlog.size,
                "world_size": world.world_size,
                "identity": same,
                "optimizer": optimizer.state_dict(),
                "scaler": step.scaler.state_dict(),
            },
            best=best,
        )

    def stop(signal_number: int) -> NoReturn:
        """End this process; what was saved last is on the disk then."""
        if saver is not None:
            saver.wait()
            say(f"stopped by {signal.Signals(signal_number).name}; the same command continues")
        raise Stopped(signal_number)

    def stop_together(signal_number: int) -> NoReturn:
        """End all processes, none before the state is on the disk: torchrun ends the others after the first."""
        if saver is not None:
            saver.wait()
        distributed.barrier()
        stop(signal_number)

    def moved() -> None:
        """Called between the batches of an evaluation; the weights were saved before it."""
        distributed.progress(config.stall_minutes)
        if request.signal_number:
            stop(request.signal_number)

    # --- train
    evaluations = 0
    for epoch in range(first_epoch, config.epochs):
        start_step = first_step if epoch == first_epoch else 0
        set_lr(optimizer, lr_at(config, epoch))
        tally = Tally(world.device, "loss", "top1")
        if start_step and saved is not None and world.rank == 0:
            tally.load(saved["tally"])
        bar = Bar(
            loader.epoch(epoch, start_step),
            total=loader.steps_per_epoch,
            initial=start_step,
            images_per_batch=config.global_batch_size,
            title=f"epoch {epoch + 1}/{config.epochs}",
            show=world.rank == 0,
        )
        stop_signal = 0
        with profile(config.profile if epoch == first_epoch and world.rank == 0 else 0, out) as profiler:
            for number, batch in enumerate(bar, start_step):
                seed_step(config.seed, epoch, number, world.rank)
                result = step(batch)
                tally.add(result.loss, result.correct)
                done = epoch * loader.steps_per_epoch + number + 1
                divergence.note(done, result.loss)
                distributed.progress(config.stall_minutes)
                if number % config.log_every == config.log_every - 1:
                    check_finite()
                    means = tally.means(over_ranks=False)
                    bar.show(loss=means["loss"], top1_pct=100 * means["top1"])
                    runlog.scalars("train_step", done, **means)
                if profiler is not None:
                    profiler.step()
                save_now, stop_signal = ballot(due(done), request.signal_number)
                if (save_now or stop_signal) and number + 1 < loader.steps_per_epoch:
                    save(epoch, number + 1, tally)
                    if stop_signal:
                        stop_together(stop_signal)
        stop_signal = stop_signal or ballot.outstanding(2)[1]
        check_finite()
        if start_step < loader.steps_per_epoch:
            means = tally.means(over_ranks=True)
            runlog.record(
                "train",
                done,
                epoch=epoch + 1,
                loss=means["loss"],
                top1_pct=100 * means["top1"],
                lr=lr_at(config, epoch),
                images_per_sec=round(bar.images_per_sec, 1),
                data_wait_pct=round(bar.data_wait_pct, 1),
            )

        # --- evaluate
        last = epoch + 1 == config.epochs
        evaluates = last or (config.eval_every > 0 and (epoch + 1) % config.eval_every == 0)
        if evaluates or stop_signal:
            save(epoch, loader.steps_per_epoch, tally)
        if stop_signal:
            stop_together(stop_signal)
        improved = False
        if evaluates:
            before = runlog.elapsed_sec
            judge.refresh()
            bar = Bar(
                eval_loader.epoch(evaluations),
                total=eval_loader.steps_per_epoch,
                images_per_batch=config.global_batch_size,
                title="evaluate",
                show=world.rank == 0,
            )
            scores = validate(
                eval_passes, bar, warps=eval_warps, images=len(val_images), device=world.device, moved=moved
            )
            evaluations += 1
            runlog.record(
                "evaluation",
                done,
                epoch=epoch + 1,
                **scores,
                cost_pct=round(100 * (runlog.elapsed_sec - before) / max(runlog.elapsed_sec, 1e-9), 1),
            )
            chosen = scores["attacked_top1_pct"] if scores["attacked_top1_pct"] is not None else scores["top1_pct"]
            assert chosen is not None
            improved, best_pct = chosen > best_pct, max(chosen, best_pct)
        save(epoch + 1, 0, best=improved)
        distributed.progress(config.stall_minutes)
    if saver is not None:
        saver.wait()
    distributed.barrier()
    if world.rank == 0 and (skipped := bad_images.paths()):
        say(f"{len(skipped)} training images could not be decoded and were replaced: {some(skipped)}")


def record_environment(out: Path, config: TrainConfig, world: World, done: int) -> None:
    """Add a line to OUT/environment.jsonl: what this part of the run was started with, on, and after which step."""
    about = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "steps_before": done,
        "command": os.environ.get(COMMAND_VARIABLE),
        "world_size": world.world_size,
        "config": to_json(config),
        **environment(),
    }
    with open(out / "environment.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(about) + "\n")


def check_same_run(there: dict[str, Any], here: dict[str, Any], config: TrainConfig) -> None:
    """Raise a ValueError if a checkpoint is of another run than what would go on here."""
    mine, theirs = ({**about["recipe"], **about} for about in (here, there))
    differences = [
        f"{name} {theirs.get(name)} there, {mine[name]} here"
        for name in mine
        if name != "recipe" and theirs.get(name) != mine[name]
    ]
    if differences:
        advice = "name a new folder"
        if config.dtype == "auto" and theirs["dtype"] != mine["dtype"]:
            advice = f"add --dtype {theirs['dtype']}, which is not what this machine is best at, or {advice}"
        raise ValueError(f"--out {config.out}: it holds another run ({'; '.join(differences)})\n{advice}")


def check_processes_agree(world: World, about: dict[str, Any]) -> None:
    """Raise a ValueError if this process would not do the same as the others."""
    for name, value in about.items():
        if not distributed.agree(zlib.crc32(json.dumps(value).encode()), world.device):
            raise ValueError(
                f"the processes differ in their {name}: {value} here\n"
                f"give the same command on all nodes, with the same images, and --out on a disk that they share"
            )


def describe_resume(saved: dict[str, Any], config: TrainConfig, world: World, done: int) -> str:
    """Where a run goes on, and what is different from there on."""
    lines = [f"continued after {done} steps (epoch {min(saved['epoch'] + 1, config.epochs)} of {config.epochs})"]
    if saved["epoch"] == config.epochs:
        lines = ["this run is finished"]
    elif saved["world_size"] != world.world_size:
        same = "the images and their draws stay the same"
        lines.append(f"on {world.world_size} processes instead of {saved['world_size']}: {same}")
        if not config.bn_group:
            lines.append("BatchNorm normalizes over batches of another size (--bn-group fixes their size)")
    return "\n".join(lines)


def diverged(step: int, steps_per_epoch: int, out: Path) -> str:
    """What to say about a loss that is no number any more."""
    kept = next((f"; {out / name} was saved before" for name in (LAST, PREVIOUS) if (out / name).is_file()), "")
    return (
        f"the loss is no finite number since step {step} (epoch {(step - 1) // steps_per_epoch + 1}): training "
        f"diverged{kept}\ntry a smaller --lr, or --dtype float32, in a new folder"
    )


def validate(
    passes: Passes,
    batches: Iterable[Batch],
    *,
    warps: int,
    images: int,
    device: torch.device,
    moved: Callable[[], None],
) -> dict[str, float | None]:
    """Natural top-1, top-5 and loss on the validation images, and accuracy under the training attack (None without).

    The batches' views are the untouched image and `warps` random ones; `moved` is called after every batch.

    Raises:
        RuntimeError: if not each of the split's `images` was judged exactly once.

    """
    tally, once = Tally(device, "top1", "top5", "loss", "attacked"), EachOnce(images, device)
    for batch in batches:
        once.add(batch.index)
        found = verdicts(passes(batch.views), batch.labels)
        tally.add(found.natural, found.natural_top5, found.natural_loss, found.random if warps == 1 else found.worst)
        moved()
    once.check()
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
