"""What happens between two steps: the processes agree on saving, on stopping, and on a new end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

from torch import Tensor

from fast_spatial.config.train import TrainConfig
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import StepAgreement, World
from fast_spatial.runtime.metrics import Divergence
from fast_spatial.runtime.runlog import say
from fast_spatial.runtime.signals import Stopped, StopRequest
from fast_spatial.training.messages import diverged, time_was_up
from fast_spatial.training.pacing import NewEnd, Pacer, TrainingDeadline
from fast_spatial.training.run_folder import RunFolder
from fast_spatial.training.schedule import Timeline
from fast_spatial.training.state import Position


class CheckpointTimer:
    """Tells when a checkpoint is due: every `steps` steps, else every `seconds` seconds; 0: never."""

    def __init__(self, steps: int, seconds: float) -> None:
        self._steps, self._seconds, self._since = steps, seconds, time.monotonic()

    def __call__(self, step: int) -> bool:
        """Whether a checkpoint is due after a step, counted from the start of the run."""
        if self._steps:
            return step % self._steps == 0
        if not self._seconds or time.monotonic() - self._since < self._seconds:
            return False
        self._since = time.monotonic()
        return True


class Action(NamedTuple):
    """What all processes do now: save a checkpoint; stop for a signal (0: go on)."""

    save: bool
    stop: int


class StepControl:
    """Decides between steps, so that all processes save, stop and end at the same one.

    A collective operation that only some processes enter would hang. A decision therefore needs an agreement, which
    costs no wait: each process gets the answer of the previous step (`StepAgreement`).

    Args:
        config: the options of the training.
        world: this process and its group.
        folder: the run's folder.
        timeline: the planned progress; new ends are added to it.
        deadline: the deadline of a budget, or None.
        request: the stop signals of this process.

    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        folder: RunFolder,
        timeline: Timeline,
        deadline: TrainingDeadline | None,
        request: StopRequest,
    ) -> None:
        self._config, self._world, self._folder = config, world, folder
        self._timeline, self._request = timeline, request
        self._agreement, self._divergence = StepAgreement(wishes=4), Divergence(world.device)
        self._deadline = deadline
        self._pacer: Pacer | None = None
        # Rank 0 alone measures time, for saving as for the deadline: clocks of processes differ.
        leads = world.rank == 0
        self._is_due = CheckpointTimer(config.checkpoint_steps if leads else 0, config.checkpoint_sec if leads else 0)

    def begin(self, position: Position) -> None:
        """With a deadline, plan the last step before the first one. The time of steps begins here."""
        if self._deadline is None:
            return
        self._pacer = Pacer(self._deadline, self._config, self._timeline, position.steps_per_epoch)
        done = position.steps_done
        if self._config.schedule != "milestones" and done < self._timeline.end:
            end = distributed.broadcast(self._pacer.first_end(done), self._world.device)
            self._follow(NewEnd(done, end), position)

    def after_step(self, position: Position, losses: Tensor, side: int) -> Action:
        """Report the losses and image size of a step; returns what all processes do now."""
        self._divergence.note(position.steps_done, losses)
        distributed.reset_watchdog(self._config.stall_minutes)
        if position.step % self._config.log_every == 0:
            self.check_finite(position)
        new_end = NewEnd()
        if self._pacer is not None and self._world.rank == 0:
            new_end = self._pacer.after_step(position.steps_done, side)
        save, stop, *agreed = self._agreement(self._is_due(position.steps_done), self._request.signal_number, *new_end)
        self._follow(NewEnd(*agreed), position)
        return Action(bool(save), stop)

    def after_epoch(self, position: Position) -> int:
        """Collect the last step's agreement; returns the signal to stop for, or 0."""
        _, stop, *agreed = self._agreement.outstanding()
        self._follow(NewEnd(*agreed), position)
        self.check_finite(position)
        return stop

    def after_evaluation(self, seconds: float) -> None:
        """Report how long an evaluation between epochs took."""
        if self._pacer is not None:
            self._pacer.evaluated(seconds)

    def during_evaluation(self) -> None:
        """Between the batches of an evaluation, stop at once if asked to: a checkpoint was saved before it."""
        distributed.reset_watchdog(self._config.stall_minutes)
        if self._request.signal_number:
            self._stop(self._request.signal_number)

    def check_finite(self, position: Position, weights: Iterable[Tensor] = ()) -> None:
        """Raise a UserError if losses since the start, or these weights, are NaN or inf; a collective call."""
        if weights := list(weights):
            self._divergence.note(position.steps_done, *weights)
        first = self._divergence.first_step()
        if first is not None:
            raise diverged(first, position.steps_per_epoch, self._folder.out)

    def stop_together(self, signal_number: int) -> NoReturn:
        """End all processes once the checkpoint is on disk: torchrun kills the others after the first exit."""
        self._folder.wait()
        distributed.barrier()
        self._stop(signal_number)

    def _stop(self, signal_number: int) -> NoReturn:
        self._folder.wait()
        if self._world.rank == 0:
            say(f"stopped by {signal.Signals(signal_number).name}; run the same command to resume")
        raise Stopped(signal_number)

    def _follow(self, new_end: NewEnd, position: Position) -> None:
        """Add a new end to the timeline, unless the training ends before it would take effect."""
        if not new_end.end or new_end.start >= self._timeline.end:
            return
        segment = self._timeline.replan(*new_end)
        self._folder.log.note("segment", position.steps_done, **segment._asdict())
        if segment.start == segment.end and self._world.rank == 0:
            say(time_was_up(segment))
