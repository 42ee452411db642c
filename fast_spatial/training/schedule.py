"""The learning rate and the side of a training, as pure functions of how far it is.

Progress is the fraction of the training that is done, in [0, 1]; without a budget, steps done / all steps. With one,
a `Timeline` of segments says how far a step is. Everything else here depends on progress alone, so a training that is
cut to a deadline still ends its decay at the deadline. Milestones are the exception: they are epochs, as published, and
are never rescaled.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fast_spatial.config.train import SIZE_STEP, TrainConfig

# From here on, training is at the full side: the progress of the recipes that this style comes from.
FULL_SIDE_FROM = 0.75


class Segment(NamedTuple):
    """From step `start` on, where `progress` of the training is done, it goes evenly to 1 at step `end`.

    With `end` at `start`, the training is stopped there.
    """

    start: int
    progress: float
    end: int


class Timeline:
    """How far a training is before every step: segments, continuous where one follows another.

    A step belongs to the last segment that begins at it or before, so what is added later changes no step before.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = [Segment(*segment) for segment in segments]

    @classmethod
    def of_steps(cls, steps: int) -> Timeline:
        """The timeline of a training of so many steps."""
        return cls([Segment(0, 0.0, steps)])

    @property
    def end(self) -> int:
        """Steps of the whole training, as it is planned now."""
        return self.segments[-1].end

    def progress(self, step: int) -> float:
        """The share of the training that is done before a step, in [0, 1]."""
        start, progress, end = next(s for s in reversed(self.segments) if s.start <= step)
        return progress + (1 - progress) * (step - start) / (end - start) if step < end else 1.0

    def replan(self, start: int, end: int) -> Segment:
        """From step `start` on, go to the end at step `end` instead; returns the new segment."""
        self.segments.append(Segment(start, self.progress(start), end))
        return self.segments[-1]


def lr_at(config: TrainConfig, progress: float, epoch: int) -> float:
    """The learning rate of the step after `progress`, in an epoch; only milestones look at the epoch.

    Linear: from 0 at the start to `lr` after `warmup_epochs`, and on to 0 at progress 1.
    """
    if config.schedule == "milestones":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    peak = config.warmup_epochs / config.epochs
    if progress < peak:
        return config.lr * progress / peak
    return config.lr * max(0.0, 1 - progress) / (1 - peak)


def side_starts(config: TrainConfig) -> list[tuple[float, int]]:
    """(progress, side): the sides of a training, and from where on each is used.

    They are 32 pixels apart where `start_side` and `side` are a multiple of 32 apart, else 16. All but the last, which
    begins at three quarters, are used for equally long.
    """
    if not config.start_size:
        return [(0.0, config.image_size)]
    gap = config.image_size - config.start_size
    sides = range(config.start_size, config.image_size + 1, SIZE_STEP if gap % (2 * SIZE_STEP) else 2 * SIZE_STEP)
    return [(FULL_SIDE_FROM * number / (len(sides) - 1), side) for number, side in enumerate(sides)]


def side_at(config: TrainConfig, progress: float) -> int:
    """The side of the views of the step after `progress`, pixels."""
    return max(side for start, side in side_starts(config) if start <= progress)


def mean_over_rest(config: TrainConfig, progress: float, at_side: Mapping[int, float]) -> float:
    """The mean over the rest of a training of what depends on the side: of seconds per step, say."""
    if progress >= 1:
        return at_side[config.image_size]
    starts = [*side_starts(config), (1.0, 0)]
    parts = (
        max(0.0, end - max(start, progress)) * at_side[side] for (start, side), (end, _) in itertools.pairwise(starts)
    )
    return sum(parts) / (1 - progress)
