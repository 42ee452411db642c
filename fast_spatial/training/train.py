"""Training one model: read `_train` from top to bottom; `step.py` takes each batch from views to new weights."""

from __future__ import annotations

import contextlib
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from fast_spatial.config.fields import identity, to_json
from fast_spatial.config.modes import MODES
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.decoders import keep_failure, previous_placement
from fast_spatial.data.images import load_split
from fast_spatial.data.loading import training_loader
from fast_spatial.data.placing import placement_of
from fast_spatial.errors import UserError
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.validation import Validation
from fast_spatial.models import checkpoint
from fast_spatial.models.ema import WeightEma
from fast_spatial.pipelines.text import some
from fast_spatial.runtime import distributed
from fast_spatial.runtime.device import dtype_of, seed_everything, seed_step
from fast_spatial.runtime.distributed import StepAgreement, World
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.metrics import Divergence, Tally
from fast_spatial.runtime.run_files import BEST, CONFIG, ENVIRONMENT, LAST, PREVIOUS, PROFILE
from fast_spatial.runtime.runlog import Bar, RunLog, say
from fast_spatial.runtime.signals import Stopped, StopRequest, stop_requests
from fast_spatial.runtime.waiting import clock_of
from fast_spatial.training.bad_images import BadImages
from fast_spatial.training.messages import describe, describe_resume, diverged, time_was_up
from fast_spatial.training.optim import set_lr
from fast_spatial.training.pacing import NewEnd, Pacer, TrainingDeadline
from fast_spatial.training.run_folder import (
    CheckpointTimer,
    Saver,
    check_processes_agree,
    check_same_run,
    find_latest,
    read_segments,
    record_environment,
)
from fast_spatial.training.schedule import Segment, Timeline, lr_at, side_at
from fast_spatial.training.step import make_step

PROFILE_AFTER_STEPS = 10


def train(config: TrainConfig, world: World, pace: TrainingDeadline | None = None) -> None:
    """Train a model; write `best.pt`, `last.pt`, `log.jsonl` and TensorBoard scalars into its folder.

    With a pace, the deadline sets the number of steps instead of the recipe's epochs.

    Raises:
        Stopped: if the process got a stop signal; the run is saved and can be resumed.
        UserError: if the folder holds another run or cannot be written, or the loss becomes NaN or inf.

    """
    with stop_requests() as request, contextlib.ExitStack() as opened:
        try:
            _train(config, world, pace, request, opened)
        except UserError as error:
            if request.signal_number or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
                say(f"{error}")  # the launcher reports only the error that ends it
            raise


def _train(
    config: TrainConfig, world: World, pace: TrainingDeadline | None, request: StopRequest, opened: contextlib.ExitStack
) -> None:
    # --- set up
    seed_everything(config.seed, deterministic=config.deterministic)
    out = Path(config.out)
    dtype = dtype_of(config.dtype, world.device)
    load = partial(load_split, config.data, exclude=config.exclude, classes=config.max_classes)
    train_images, val_images = load("train", max_images=config.max_train_images), load("val")
    step = make_step(config, len(train_images.classes), world.device, dtype)
    net, optimizer = step.model.net, step.optimizer
    average = WeightEma(step.model, config.ema) if config.ema else None
    if average is None:
        judge = step.scorer or FoldedJudge(step.model, dtype)
    else:
        judge = FoldedJudge(average.model, dtype, compiled=config.is_compiled(on_gpu=world.device.type == "cuda"))
    steps_per_epoch = len(train_images) // config.global_batch_size
    timeline = Timeline.of_steps(config.epochs * steps_per_epoch)

    bad_images = BadImages(
        out, world.rank, train_images, skip=config.on_bad_image == "skip", at_most=config.max_bad_images
    )

    def failed_on_gpu(what: str) -> None:
        say(what)
        runlog.note("decoding", done, steps_before=done, what=what)
        if world.rank:  # only rank 0 writes a log
            keep_failure(out, world.rank, what, done)

    loader = training_loader(
        config,
        train_images,
        world,
        side=lambda epoch, number: side_at(config, timeline.progress(epoch * steps_per_epoch + number)),
        on_bad_images=bad_images.met,
        bad_images=bad_images.positions(),
        on_gpu_failure=failed_on_gpu,
    )
    validate = Validation(config, world, val_images, judge, on_gpu_failure=failed_on_gpu)

    if 0 < steps_per_epoch < PROFILE_AFTER_STEPS + config.profile and config.profile:
        raise UserError(
            f"--profile {config.profile}: needs {PROFILE_AFTER_STEPS + config.profile} steps per epoch, but an epoch "
            f"has {steps_per_epoch}",
            "lower --profile or --global-batch-size",
        )

    # --- resume
    gpus = world.world_size if world.device.type == "cuda" else 0
    runlog = opened.enter_context(contextlib.closing(RunLog(out, rank=world.rank, gpus=gpus)))
    saver = opened.enter_context(contextlib.closing(Saver(out))) if world.rank == 0 else None
    distributed.barrier()  # rank 0 has locked the folder, and no process writes to it: all may read
    saved, damaged = find_latest(out)
    same = {
        "recipe": identity(config),
        "dtype": str(dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype,
        "training images": train_images.fingerprint(),
        "validation images": val_images.fingerprint(),
    }
    first_epoch = first_step = 0
    best_pct = -1.0
    if config.replay:
        timeline.segments += read_segments(config.replay)
        same["replay"] = f"{len(timeline.segments)} segments, {timeline.end} steps"
    if saved is not None:
        check_same_run(saved["identity"], same, config)
        if average is None:
            checkpoint.set_weights(net, saved["model"])
        else:
            checkpoint.set_weights(average.model.net, saved["model"])
            checkpoint.set_weights(net, saved["trained"])
        optimizer.load_state_dict(saved["optimizer"])
        step.scaler.load_state_dict(saved["scaler"])
        first_epoch, first_step, best_pct = saved["epoch"], saved["step"], saved["best_pct"]
        if "segments" in saved:  # missing in runs of earlier versions
            timeline.segments[:] = [Segment(*segment) for segment in saved["segments"]]
        if step.scorer is not None:
            step.scorer.refresh()
    done = first_epoch * steps_per_epoch + first_step
    check_processes_agree(
        world, {"position": done, **same, "--log-every and --eval-every": [config.log_every, config.eval_every]}
    )
    if saved is None:
        runlog.begin()
    else:
        runlog.begin(elapsed_sec=saved["elapsed_sec"], size=saved["log_size"], step=done)
    if world.rank == 0:
        write_json(out / CONFIG, to_json(config))
        placement = placement_of(config, world, exact=config.deterministic)
        decoded_by, warped_by = previous_placement(out / ENVIRONMENT) if saved is not None else (None, None)
        if world.decoding is not None and decoded_by not in (None, world.decoding.decoding):
            say(f"decoding changed at step {done}: from {decoded_by} to {world.decoding.decoding}")
        if warped_by not in (None, placement.warp):
            say(f"warp changed at step {done}: from {warped_by} to {placement.warp}")
        record_environment(out, config, world, done, placement.warp)
        for path in damaged:
            say(f"{path} is damaged: resuming from the earlier {PREVIOUS}")
        for left_out in filter(None, (train_images.describe_left_out(), val_images.describe_left_out())):
            say(left_out)
        epochs = f"{timeline.end / steps_per_epoch:.4g} epochs"
        if pace is not None and config.schedule != "milestones":
            epochs = "as many epochs as the time allows"
        say(describe(config, world, dtype, len(train_images), len(val_images), len(train_images.classes), epochs))
        if saved is not None:
            say(describe_resume(saved, config, world, done, finished=first_epoch * steps_per_epoch >= timeline.end))
    if saver is not None:
        saver.set_aside(damaged)

    if saved is None:
        for segment in timeline.segments[1:]:  # from --replay
            runlog.note("segment", done, **segment._asdict())

    # --- what happens between steps
    ballot, divergence = StepAgreement(wishes=4), Divergence(world.device)
    pacemaker = None if pace is None else Pacer(pace, config, timeline, steps_per_epoch)
    due = CheckpointTimer(
        config.checkpoint_steps if world.rank == 0 else 0, config.checkpoint_sec if world.rank == 0 else 0
    )

    def follow(decision: NewEnd) -> None:
        """Add a decision's segment to the timeline, unless the current plan ends before it starts."""
        if decision.end and decision.start < timeline.end:
            segment = timeline.replan(*decision)
            runlog.note("segment", done, **segment._asdict())
            if segment.start == segment.end and world.rank == 0:
                say(time_was_up(segment))

    def check_finite() -> None:
        first = divergence.first_step()
        if first is not None:
            raise diverged(first, steps_per_epoch, out)

    def save(epoch: int, step_of_epoch: int, tally: Tally | None = None, *, best: bool = False) -> None:
        """Save a checkpoint at (epoch, step). A full epoch is saved before its evaluation."""
        divergence.note(done, *net.parameters(), *(b for b in net.buffers() if b.is_floating_point()))
        check_finite()
        sums = None if tally is None else tally.state()
        if saver is None:
            return
        saver.save(
            {
                "format": checkpoint.FORMAT,
                # The evaluated weights. With EMA, training resumes from `trained` instead.
                "model": net.state_dict() if average is None else average.state_dict(),
                "trained": None if average is None else net.state_dict(),
                "arch": config.arch,
                "classes": list(train_images.classes),
                "config": to_json(config),
                "epoch": epoch,
                "step": step_of_epoch,
                "steps": done,
                "tally": sums,
                "segments": [list(segment) for segment in timeline.segments],
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
        """End this process once the last checkpoint is on disk."""
        if saver is not None:
            saver.wait()
            say(f"stopped by {signal.Signals(signal_number).name}; run the same command to resume")
        raise Stopped(signal_number)

    def stop_together(signal_number: int) -> NoReturn:
        """End all processes once the checkpoint is on disk: torchrun kills the others after the first exit."""
        if saver is not None:
            saver.wait()
        distributed.barrier()
        stop(signal_number)

    def moved() -> None:
        """Called between the batches of an evaluation; a checkpoint was saved before it."""
        distributed.reset_watchdog(config.stall_minutes)
        if request.signal_number:
            stop(request.signal_number)

    # --- train
    if pacemaker is not None and done < timeline.end and config.schedule != "milestones":
        follow(NewEnd(done, distributed.broadcast(pacemaker.first_end(done), world.device)))
    epoch = first_epoch
    while epoch * steps_per_epoch < timeline.end:
        start_step = first_step if epoch == first_epoch else 0
        steps_before = done
        tally = Tally(world.device, "loss", "top1")
        if start_step and saved is not None and world.rank == 0:
            tally.load(saved["tally"])
        bar = Bar(
            loader.epoch(epoch, start_step),
            total=min(steps_per_epoch, timeline.end - epoch * steps_per_epoch),
            initial=start_step,
            images_per_batch=config.global_batch_size,
            title=f"epoch {epoch + 1}/{timeline.end / steps_per_epoch:.3g}",
            show=world.rank == 0,
            wait=clock_of(world.device),
        )
        stop_signal = 0
        with profile(config.profile if epoch == first_epoch and world.rank == 0 else 0, out) as profiler:
            for number, batch in enumerate(bar, start_step):
                if done >= timeline.end:
                    break
                lr = lr_at(config, timeline.progress(done), epoch)
                set_lr(optimizer, lr)
                seed_step(config.seed, epoch, number, world.rank)
                result = step(batch)
                if average is not None:
                    average.update()
                tally.add(result.loss, result.correct)
                done += 1
                divergence.note(done, result.loss)
                distributed.reset_watchdog(config.stall_minutes)
                if number % config.log_every == config.log_every - 1:
                    check_finite()
                    means = tally.means(over_ranks=False)
                    bar.show(loss=means["loss"], top1_pct=100 * means["top1"])
                    runlog.scalars("train_step", done, **means, lr=lr, side=batch.side)
                if profiler is not None:
                    profiler.step()
                decision = NewEnd()
                if pacemaker is not None and world.rank == 0:
                    decision = pacemaker.after_step(done, batch.side)
                save_now, stop_signal, *decided = ballot(due(done), request.signal_number, *decision)
                follow(NewEnd(*decided))
                if (save_now or stop_signal) and number + 1 < steps_per_epoch:
                    save(epoch, number + 1, tally)
                    if stop_signal:
                        stop_together(stop_signal)
        bar.close()
        _, late_signal, *decided = ballot.outstanding()
        stop_signal = stop_signal or late_signal
        follow(NewEnd(*decided))
        check_finite()
        last = done >= timeline.end
        steps_of_epoch = done - epoch * steps_per_epoch
        epochs_done = epoch + 1 if steps_of_epoch == steps_per_epoch else round(done / steps_per_epoch, 3)
        if done > steps_before:
            means = tally.means(over_ranks=True)
            runlog.record(
                "train",
                done,
                epoch=epochs_done,
                loss=means["loss"],
                top1_pct=100 * means["top1"],
                lr=lr,
                images_per_sec=round(bar.images_per_sec, 1),
                data_wait_pct=round(bar.data_wait_pct, 1),
            )

        # --- evaluate
        evaluates = last or (config.eval_every > 0 and (epoch + 1) % config.eval_every == 0)
        if evaluates or stop_signal:
            save(epoch, steps_of_epoch, tally)
        if stop_signal:
            stop_together(stop_signal)
        improved = False
        if evaluates:
            before = runlog.elapsed_sec
            scores = validate(moved)
            runlog.record(
                "evaluation",
                done,
                epoch=epochs_done,
                **scores,
                cost_pct=round(100 * (runlog.elapsed_sec - before) / max(runlog.elapsed_sec, 1e-9), 1),
            )
            if pacemaker is not None:
                pacemaker.evaluated(runlog.elapsed_sec - before)
            chosen = scores["attacked_top1_pct"] if scores["attacked_top1_pct"] is not None else scores["top1_pct"]
            assert chosen is not None
            improved, best_pct = chosen > best_pct, max(chosen, best_pct)
        epoch += 1
        save(epoch, 0, best=improved)
        distributed.reset_watchdog(config.stall_minutes)
    if saver is not None:
        saver.wait()
    distributed.barrier()
    if world.rank == 0:
        if skipped := bad_images.paths():
            say(f"{len(skipped)} training images could not be decoded and were replaced: {some(skipped)}")
        judged = "under the training attack" if MODES[config.mode].warps != 0 else "on natural images"
        say(f"best model: {out / BEST} ({best_pct:.1f} % accuracy {judged}); last model: {out / LAST}")


@contextlib.contextmanager
def profile(steps: int, out: Path) -> Any:
    """Trace `steps` steps after the tenth into OUT/profile.json; yields the profiler, or None if `steps` is 0."""
    if not steps:
        yield None
        return
    schedule = torch.profiler.schedule(wait=PROFILE_AFTER_STEPS - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(out / PROFILE))
    ) as profiler:
        yield profiler
