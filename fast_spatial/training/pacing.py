"""Training to a deadline: measures the step time and plans the number of remaining steps.

At intervals, rank 0 plans a new last step from the measured step time and the time left. All processes learn of it
through `distributed.StepAgreement`, and a new segment of the training's timeline begins. Learning rate and image size
follow the timeline, so both reach their final values at any speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fast_spatial.config.budget_policy import DEFAULT_POLICY, BudgetPolicy
from fast_spatial.config.train import TrainConfig
from fast_spatial.training.schedule import Timeline, mean_over_rest, side_at, side_starts


@dataclass(frozen=True)
class TrainingDeadline:
    """A training's deadline and its calibrated times.

    Attributes:
        until: the deadline of the training and its final work, as `time.monotonic()` of this machine.
        after_sec: seconds of the work after the last step: the final evaluation, and all else before the deadline.
        step_sec: seconds per step, by image size.
        evaluation_sec: seconds of an evaluation between epochs.
        interval_sec: seconds between two decisions.

    """

    until: float
    after_sec: float
    step_sec: Mapping[int, float]
    evaluation_sec: float
    interval_sec: float

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingDeadline:
        """The inverse of `dataclasses.asdict`, over JSON."""
        return cls(**{**values, "step_sec": {int(side): seconds for side, seconds in values["step_sec"].items()}})


class NewEnd(NamedTuple):
    """From step `start` on, training ends at step `end`. Both 0: no change. Equal: stop at that step."""

    start: int = 0
    end: int = 0


class Pacer:
    """Plans the number of remaining steps.

    Args:
        deadline: the deadline and the calibrated times.
        config: the training.
        timeline: its planned progress; the caller adds the decided segments.
        steps_per_epoch: optimizer steps per epoch.
        clock: returns the time in seconds.
        policy: constants of its decisions.

    """

    def __init__(
        self,
        deadline: TrainingDeadline,
        config: TrainConfig,
        timeline: Timeline,
        steps_per_epoch: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        policy: BudgetPolicy = DEFAULT_POLICY,
    ) -> None:
        self._deadline, self._config, self._timeline = deadline, config, timeline
        self._steps_per_epoch, self._clock, self._policy = steps_per_epoch, clock, policy
        self._half_life_sec = max(policy.shortest_half_life_sec, policy.half_life_intervals * deadline.interval_sec)
        # (measured, expected) seconds of past steps, which begin with calibrated ones.
        recent_sec, overall_sec = (n * deadline.interval_sec for n in (policy.trust_recent, policy.trust_overall))
        self._recent, self._overall = (recent_sec, recent_sec), (overall_sec, overall_sec)
        self._side, self._settling = 0, 0
        self._evaluation_sec = deadline.evaluation_sec
        self._step_ended = self._decided = clock()

    def evaluated(self, seconds: float) -> None:
        """Record an evaluation's duration and exclude it from step timing. Other work between epochs stays included."""
        self._evaluation_sec = seconds
        self._step_ended += seconds

    @property
    def _slowdown_after(self) -> float:
        """Expected slowdown factor of the work after the last step."""
        took, expected = self._overall
        return max(1.0, min(took / expected, self._policy.largest_slowdown))

    def first_end(self, done: int) -> int:
        """The initial plan: the last step, counted from the start of the training, after `done` steps."""
        return done + max(1, self._affordable(done, self._left_sec()))

    def after_step(self, done: int, side: int) -> NewEnd:
        """Record the end of a step at an image size; returns what is decided now."""
        now, policy = self._clock(), self._policy
        took, self._step_ended = now - self._step_ended, now
        if side != self._side:
            self._side, self._settling = side, policy.settling_steps
        if self._settling:
            self._settling -= 1
        else:
            self._note(took, self._deadline.step_sec[side])
        if self._deadline.until - now < policy.least_after * self._deadline.after_sec and done + 1 < self._timeline.end:
            return NewEnd(done + 1, done + 1)
        if self._config.schedule == "milestones" or now - self._decided < self._deadline.interval_sec:
            return NewEnd()
        start = done + (policy.lead_steps if self._side_is_final(done) else policy.lead_steps_of_sizes)
        if start >= self._timeline.end or self._timeline.segments[-1].start > done:
            return NewEnd()
        self._decided = now
        shortest = int(policy.most_shortened * (self._timeline.end - done))
        end = max(start + 1, done + shortest, done + self._affordable(done, self._left_sec()))
        return NewEnd() if end == self._timeline.end else NewEnd(start, end)

    def _note(self, took: float, expected: float) -> None:
        kept = 0.5 ** (took / self._half_life_sec)
        self._recent = self._recent[0] * kept + took, self._recent[1] * kept + expected
        self._overall = self._overall[0] + took, self._overall[1] + expected

    def _left_sec(self) -> float:
        """Seconds left for steps and the evaluations between them."""
        return self._deadline.until - self._slowdown_after * self._deadline.after_sec - self._clock()

    def _affordable(self, done: int, left_sec: float) -> int:
        """Number of steps that fit into `left_sec`, with the evaluations between epochs."""
        took, expected = self._recent
        progress = self._timeline.progress(done)
        step_sec = took / expected * mean_over_rest(self._config, progress, self._deadline.step_sec)
        evaluations = 0
        while True:
            steps = int(max(0.0, left_sec - evaluations * self._evaluation_sec) / step_sec)
            if self._evaluations_within(done, steps) <= evaluations:
                return steps
            evaluations += 1

    def _evaluations_within(self, done: int, steps: int) -> int:
        """Number of evaluations between epochs in the next `steps` steps, without the final one."""
        if not steps or not self._config.eval_every:
            return 0
        between = self._config.eval_every * self._steps_per_epoch
        return (done + steps - 1) // between - done // between

    def _side_is_final(self, done: int) -> bool:
        """Whether training, and so every prefetched batch, has reached the final image size."""
        return len(side_starts(self._config)) == 1 or (
            side_at(self._config, self._timeline.progress(done)) == self._config.image_size
        )
