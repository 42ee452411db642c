"""Training one model: `Training.run` is the loop, and `step.py` takes each batch from views to new weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fast_spatial.config.modes import MODES
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.images import load_split
from fast_spatial.data.loading import training_loader, training_views
from fast_spatial.errors import UserError
from fast_spatial.evaluation.validation import Validation
from fast_spatial.pipelines.text import some
from fast_spatial.runtime import distributed
from fast_spatial.runtime.device import dtype_of, seed_everything, seed_step
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.run_files import BEST, LAST, PROFILE
from fast_spatial.runtime.runlog import Bar, say
from fast_spatial.runtime.signals import StopRequest, stop_requests
from fast_spatial.runtime.waiting import clock_of
from fast_spatial.training.bad_images import BadImages
from fast_spatial.training.control import StepControl
from fast_spatial.training.epoch_sums import EpochSums
from fast_spatial.training.messages import describe, describe_resume
from fast_spatial.training.pacing import TrainingDeadline
from fast_spatial.training.run_folder import RunFolder, identity_of, read_segments
from fast_spatial.training.schedule import Segment, Timeline, lr_at, side_at
from fast_spatial.training.state import Position, TrainState

PROFILE_AFTER_STEPS = 10


def train(config: TrainConfig, world: World, deadline: TrainingDeadline | None = None) -> None:
    """Train a model; write `best.pt`, `last.pt`, `log.jsonl` and TensorBoard scalars into its folder.

    With a deadline, the time sets the number of steps instead of the recipe's epochs.

    Raises:
        Stopped: if the process got a stop signal; the run is saved and can be resumed.
        UserError: if the folder holds another run or cannot be written, or the loss becomes NaN or inf.

    """
    with stop_requests() as request:
        try:
            Training(config, world, deadline, request).run()
        except UserError as error:
            if request.signal_number or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
                say(f"{error}")  # the launcher reports only the error that ends it
            raise


class Training:
    """A training: what is trained (`state`), its `position`, the plan of the rest (`timeline`), and its `folder`.

    Args:
        config: the options.
        world: this process and its group.
        deadline: the deadline of a budget, or None.
        request: the stop signals of this process.

    Raises:
        UserError: if the images or the options do not allow the training. Nothing has been written then.

    """

    def __init__(
        self, config: TrainConfig, world: World, deadline: TrainingDeadline | None, request: StopRequest
    ) -> None:
        seed_everything(config.seed, deterministic=config.deterministic)
        self._config, self._world = config, world
        load = partial(load_split, config.data, exclude=config.exclude, classes=config.max_classes)
        self._train_images, self._val_images = load("train", max_images=config.max_train_images), load("val")
        steps_per_epoch = len(self._train_images) // config.global_batch_size
        check_profile(config, steps_per_epoch)
        dtype = dtype_of(config.dtype, world.device)
        self.state = TrainState(config, len(self._train_images.classes), world.device, dtype)
        self.position = Position(steps_per_epoch)
        self.timeline = Timeline.of_steps(config.epochs * steps_per_epoch)
        if config.replay:
            self.timeline.segments += read_segments(config.replay)
        self._sums = self._new_sums()
        self._bad_images = BadImages(
            Path(config.out),
            world.rank,
            self._train_images,
            skip=config.on_bad_image == "skip",
            at_most=config.max_bad_images,
        )
        self._loader = training_loader(
            config,
            self._train_images,
            world,
            side=self._side_at,
            on_bad_images=self._bad_images.met,
            bad_images=self._bad_images.positions(),
            on_gpu_failure=self._note_failed_decoding,
        )
        self._validate = Validation(
            config, world, self._val_images, self.state.judge, on_gpu_failure=self._note_failed_decoding
        )
        about = identity_of(config, dtype, self._train_images, self._val_images, self.timeline)
        self.folder = RunFolder(config, world, self._train_images.classes, about)
        self._control = StepControl(config, world, self.folder, self.timeline, deadline, request)
        self._steps_to_profile = config.profile if world.rank == 0 else 0
        self._is_timed = deadline is not None and config.schedule != "milestones"

    def run(self) -> None:
        """Resume the run in the folder, if there is one, and train to the end.

        Raises:
            Stopped: if the process got a stop signal.
            UserError: if the folder holds another run or cannot be written, or the loss becomes NaN or inf.

        """
        with self.folder:
            self._resume()
            self._control.begin(self.position)
            while self.position.steps_in_epoch(self.timeline.end) > 0:
                with self._profile() as profiler:
                    stop = self._train_epoch(profiler)
                self._finish_epoch(stop)
            self.folder.wait()
            distributed.barrier()
            self._say_results()

    def _train_epoch(self, profiler: torch.profiler.profile | None) -> int:
        """Train the rest of an epoch, or up to the end of the training; returns the signal to stop for, or 0."""
        config, before, lr, stop = self._config, self.position, 0.0, 0
        bar = self._bar()
        batches = iter(bar)
        while self.position.step < self.position.steps_in_epoch(self.timeline.end):
            batch = next(batches)
            lr = lr_at(config, self.timeline.progress(self.position.steps_done), self.position.epoch)
            seed_step(config.seed, self.position.epoch, self.position.step, self._world.rank)
            result = self.state.step(batch, lr)
            self._sums.add(batch, result)
            self.position = self.position.next_step()
            save, stop = self._control.after_step(self.position, result.loss, batch.side)  # the same on all ranks
            if self.position.step % config.log_every == 0:
                self._show(bar, lr=lr, side=batch.side)
            if profiler is not None:
                profiler.step()
            # After the last step of the epoch or of the training, `_finish_epoch` saves and stops.
            if (save or stop) and self.position.step < self.position.steps_in_epoch(self.timeline.end):
                self._save()
                if stop:
                    self._control.stop_together(stop)
        bar.close()
        stop = self._control.after_epoch(self.position) or stop
        if self.position != before:
            self._record_epoch(bar, lr)
        return stop

    def _finish_epoch(self, stop: int) -> None:
        """Evaluate if it is time to, and go to the next epoch.

        The epoch is saved before its evaluation, so that a process that is asked to stop during it can end at once,
        without an agreement. The evaluation is repeated when the run resumes.
        """
        every, is_best = self._config.eval_every, False
        is_last = self.position.steps_done >= self.timeline.end
        evaluates = is_last or (every > 0 and (self.position.epoch + 1) % every == 0)
        if evaluates or stop:
            self._save()
        if stop:
            self._control.stop_together(stop)
        if evaluates:
            is_best = self._evaluate()
        self.position = self.position.next_epoch()
        self._sums = self._new_sums()
        self._save(best=is_best)
        distributed.reset_watchdog(self._config.stall_minutes)

    def _evaluate(self) -> bool:
        """Evaluate under the training attack; returns whether this is the best model so far."""
        log = self.folder.log
        before = log.elapsed_sec
        scores = self._validate(self._control.during_evaluation)
        took = log.elapsed_sec - before
        cost_pct = round(100 * took / max(log.elapsed_sec, 1e-9), 1)
        log.record("evaluation", self.position.steps_done, epoch=self.position.epochs_done, **scores, cost_pct=cost_pct)
        self._control.after_evaluation(took)
        attacked_pct, natural_pct = scores["attacked_top1_pct"], scores["top1_pct"]
        return self.folder.is_best(natural_pct if attacked_pct is None else attacked_pct)

    def _save(self, *, best: bool = False) -> None:
        """Save a checkpoint, unless losses or weights are NaN or inf; a collective call."""
        self._control.check_finite(self.position, self.state.weights())
        self.folder.save(self.state, self.position, self.timeline, self._sums.state_dict(), best=best)

    def _resume(self) -> None:
        """Open the log, and continue from the newest checkpoint, if there is one."""
        saved = self.folder.find_saved()
        if saved is not None:
            self.state.load_state_dict(saved)
            self.position = Position.saved(saved, self.position.steps_per_epoch)
            if "segments" in saved:  # missing in runs of earlier versions
                self.timeline.segments[:] = [Segment(*segment) for segment in saved["segments"]]
            self._sums = self._new_sums()
            if self.position.step:
                self._sums.load_state_dict(saved, leads=self._world.rank == 0)
        self.folder.begin(saved, self.position)
        if self._world.rank == 0:
            self._describe(saved)
        if saved is None:
            for segment in self.timeline.segments[1:]:  # from --replay
                self.folder.log.note("segment", self.position.steps_done, **segment._asdict())

    # --- small parts of the above

    def _side_at(self, epoch: int, step: int) -> int:
        """The image size of a step, pixels, as currently planned."""
        return side_at(self._config, self.timeline.progress(epoch * self.position.steps_per_epoch + step))

    def _new_sums(self) -> EpochSums:
        """The running sums of the epoch that begins."""
        return EpochSums(training_views(self._config), self._config.seed, self.position.epoch, self._world.device)

    def _bar(self) -> Bar:
        """The rest of an epoch's batches, with a progress bar."""
        position, end = self.position, self.timeline.end
        return Bar(
            self._loader.epoch(position.epoch, position.step),
            total=position.steps_in_epoch(end),
            initial=position.step,
            images_per_batch=self._config.global_batch_size,
            title=f"epoch {position.epoch + 1}/{end / position.steps_per_epoch:.3g}",
            show=self._world.rank == 0,
            wait=clock_of(self._world.device),
        )

    def _profile(self) -> contextlib.AbstractContextManager[torch.profiler.profile | None]:
        """The profiler of the first epoch with enough steps left, on rank 0; None in others."""
        left = self.position.steps_in_epoch(self.timeline.end) - self.position.step
        steps = self._steps_to_profile
        if not steps or left < PROFILE_AFTER_STEPS + steps:
            return contextlib.nullcontext()
        self._steps_to_profile = 0
        return profile(steps, self.folder.out)

    def _show(self, bar: Bar, *, lr: float, side: int) -> None:
        """Show the means of the epoch so far, of this process's images."""
        means = self._sums.means(over_ranks=False)
        bar.show(loss=means["loss"], top1_pct=100 * means["top1"])
        self.folder.log.scalars("train_step", self.position.steps_done, **means, lr=lr, side=side)

    def _record_epoch(self, bar: Bar, lr: float) -> None:
        """Log the means of an epoch."""
        means = self._sums.means(over_ranks=True)
        self.folder.log.record(
            "train",
            self.position.steps_done,
            epoch=self.position.epochs_done,
            loss=means["loss"],
            top1_pct=100 * means["top1"],
            lr=lr,
            images_per_sec=round(bar.images_per_sec, 1),
            data_wait_pct=round(bar.data_wait_pct, 1),
        )
        if chosen := self._sums.chosen():
            self.folder.log.note("chosen", self.position.steps_done, epoch=self.position.epochs_done, **chosen)

    def _note_failed_decoding(self, what: str) -> None:
        """Record that this process's GPU failed to decode."""
        self.folder.note_failed_decoding(what, self.position)

    def _describe(self, saved: dict[str, Any] | None) -> None:
        """Print what is trained, and from where it resumes."""
        for left_out in filter(None, (self._train_images.describe_left_out(), self._val_images.describe_left_out())):
            say(left_out)
        epochs = f"{self.timeline.end / self.position.steps_per_epoch:.4g} epochs"
        if self._is_timed:
            epochs = "as many epochs as the time allows"
        images = self._train_images
        say(
            describe(
                self._config,
                self._world,
                self.state.dtype,
                len(images),
                len(self._val_images),
                len(images.classes),
                epochs,
            )
        )
        if saved is not None:
            finished = self.position.steps_in_epoch(self.timeline.end) <= 0
            say(describe_resume(saved, self._config, self._world, self.position.steps_done, finished=finished))

    def _say_results(self) -> None:
        """Print where the models are."""
        if self._world.rank:
            return
        out = self.folder.out
        if skipped := self._bad_images.paths():
            say(f"{len(skipped)} training images could not be decoded and were replaced: {some(skipped)}")
        judged = "under the training attack" if MODES[self._config.mode].warps != 0 else "on natural images"
        best = f"{out / BEST} ({self.folder.best_pct:.1f} % accuracy {judged})"
        say(f"best model: {best}; last model: {out / LAST}")


def check_profile(config: TrainConfig, steps_per_epoch: int) -> None:
    """Raise a UserError if an epoch is too short for the steps to profile."""
    needed = PROFILE_AFTER_STEPS + config.profile
    if config.profile and 0 < steps_per_epoch < needed:
        raise UserError(
            f"--profile {config.profile}: needs {needed} steps per epoch, but an epoch has {steps_per_epoch}",
            "lower --profile or --global-batch-size",
        )


@contextlib.contextmanager
def profile(steps: int, out: Path) -> Iterator[torch.profiler.profile]:
    """Trace `steps` steps after the tenth into OUT/profile.json."""
    schedule = torch.profiler.schedule(wait=PROFILE_AFTER_STEPS - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(str(out / PROFILE))
    ) as profiler:
        yield profiler
