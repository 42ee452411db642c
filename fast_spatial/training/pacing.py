"""Keeping a training to its time: how fast its steps are, and how many of them are left.

Every so often, rank 0 looks at the clock and decides how many steps are left, all processes learn of it
(`distributed.Ballot`), and a new segment of the training's timeline begins. Learning rate and side follow the timeline,
so they end where they should whatever the speed turns out to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fast_spatial.config.train import TrainConfig
from fast_spatial.training.schedule import Timeline, mean_over_rest, side_at, side_starts

# A segment begins so many steps after it was decided on: all processes know of it one step later, and while the side of
# the views still changes, the loader has been told that of so many batches ahead.
_LEAD_STEPS, _LEAD_STEPS_OF_SIDES = 2, 10
# A process's first steps at a side, which compile and allocate, say nothing about the others.
_SETTLING_STEPS = 2
# What steps took counts half after so many intervals between decisions.
_HALF_LIFE_INTERVALS = 3
_SHORTEST_HALF_LIFE_SEC = 3.0
# How much what was expected counts against what was measured: as if so many intervals had passed as expected.
_TRUST_RECENT, _TRUST_OVERALL = 1, 3
# What comes after the last step is expected to be as much slower than measured as the steps were, but for outliers;
# where steps are faster, because of what is about them alone, it may not be.
_LARGEST_SLOWDOWN = 2.0
# A decision shortens what is left to this share at most: the next one knows better whether it was a hiccup.
_MOST_SHORTENED = 0.5
# With less time left than so much of what comes after it, a training stops at once, whatever its learning rate.
_LEAST_AFTER = 0.75


@dataclass(frozen=True)
class Pace:
    """When a training has to be done, and what it was measured to take.

    Attributes:
        until: `time.monotonic()` of this machine, until when all that belongs to the training is to be done.
        after_sec: what follows the last step: the last evaluation, and whatever else has to be done until then.
        step_sec: seconds per step, by side.
        evaluation_sec: of an evaluation between epochs.
        interval_sec: between two decisions.

    """

    until: float
    after_sec: float
    step_sec: Mapping[int, float]
    evaluation_sec: float
    interval_sec: float

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Pace:
        """The inverse of `dataclasses.asdict`, over JSON."""
        return cls(**{**values, "step_sec": {int(side): seconds for side, seconds in values["step_sec"].items()}})


class Decision(NamedTuple):
    """From step `start` on, the training ends at step `end`; both 0: no decision; equal: stop there."""

    start: int = 0
    end: int = 0


class Pacemaker:
    """Decides how many steps are left.

    Args:
        pace: when to be done.
        config: the training.
        timeline: how far it is; the caller adds the segments that are decided on.
        steps_per_epoch: of the training.
        clock: seconds.

    """

    def __init__(
        self,
        pace: Pace,
        config: TrainConfig,
        timeline: Timeline,
        steps_per_epoch: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace, self._config, self._timeline, self._clock = pace, config, timeline, clock
        self._steps_per_epoch = steps_per_epoch
        self._half_life_sec = max(_SHORTEST_HALF_LIFE_SEC, _HALF_LIFE_INTERVALS * pace.interval_sec)
        # Seconds that steps took, and were expected to take.
        self._recent, self._overall = (
            (trust * pace.interval_sec, trust * pace.interval_sec) for trust in (_TRUST_RECENT, _TRUST_OVERALL)
        )
        self._side, self._settling = 0, 0
        self._evaluation_sec = pace.evaluation_sec
        self._step_ended = self._decided = clock()

    def evaluated(self, seconds: float) -> None:
        """An evaluation between epochs took so long, which is no time of steps; all else between epochs is."""
        self._evaluation_sec = seconds
        self._step_ended += seconds

    @property
    def _slowdown_after(self) -> float:
        """How many times as long as expected what follows the last step is expected to take."""
        took, expected = self._overall
        return max(1.0, min(took / expected, _LARGEST_SLOWDOWN))

    def first_end(self, done: int) -> int:
        """The end to begin with: steps of the whole training, of which some are done."""
        return done + max(1, self._affordable(done, self._left_sec()))

    def after_step(self, done: int, side: int) -> Decision:
        """Note that another step is done, of views of this side; what is decided now."""
        now = self._clock()
        took, self._step_ended = now - self._step_ended, now
        if side != self._side:
            self._side, self._settling = side, _SETTLING_STEPS
        if self._settling:
            self._settling -= 1
        else:
            self._note(took, self._pace.step_sec[side])
        if self._pace.until - now < _LEAST_AFTER * self._pace.after_sec and done + 1 < self._timeline.end:
            return Decision(done + 1, done + 1)
        if self._config.schedule == "milestones" or now - self._decided < self._pace.interval_sec:
            return Decision()
        start = done + (_LEAD_STEPS if self._side_is_final(done) else _LEAD_STEPS_OF_SIDES)
        if start >= self._timeline.end or self._timeline.segments[-1].start > done:
            return Decision()
        self._decided = now
        shortest = int(_MOST_SHORTENED * (self._timeline.end - done))
        end = max(start + 1, done + shortest, done + self._affordable(done, self._left_sec()))
        return Decision() if end == self._timeline.end else Decision(start, end)

    def _note(self, took: float, expected: float) -> None:
        kept = 0.5 ** (took / self._half_life_sec)
        self._recent = self._recent[0] * kept + took, self._recent[1] * kept + expected
        self._overall = self._overall[0] + took, self._overall[1] + expected

    def _left_sec(self) -> float:
        """Seconds left for steps and the evaluations between them."""
        return self._pace.until - self._slowdown_after * self._pace.after_sec - self._clock()

    def _affordable(self, done: int, left_sec: float) -> int:
        """How many steps fit into so many seconds, with the evaluations between them."""
        took, expected = self._recent
        progress = self._timeline.progress(done)
        step_sec = took / expected * mean_over_rest(self._config, progress, self._pace.step_sec)
        evaluations = 0
        while True:
            steps = int(max(0.0, left_sec - evaluations * self._evaluation_sec) / step_sec)
            if self._evaluations_within(done, steps) <= evaluations:
                return steps
            evaluations += 1

    def _evaluations_within(self, done: int, steps: int) -> int:
        """Evaluations between epochs within so many steps; the last one is not between them."""
        if not steps or not self._config.eval_every:
            return 0
        between = self._config.eval_every * self._steps_per_epoch
        return (done + steps - 1) // between - done // between

    def _side_is_final(self, done: int) -> bool:
        """Whether all batches that the loader was told of have the training's last side."""
        return len(side_starts(self._config)) == 1 or (
            side_at(self._config, self._timeline.progress(done)) == self._config.image_size
        )
