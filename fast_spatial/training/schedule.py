"""Learning rate and image size, as pure functions of training progress.

Progress is the completed fraction of the training, in [0, 1]. Without a budget it is steps done / all steps. With a
budget, a `Timeline` of segments maps steps to progress. All else here depends on progress alone, so a training that is
cut to a deadline still completes its learning-rate decay. Milestones are the exception: they are epochs, as published,
and are never rescaled.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fast_spatial.config.train import SIZE_STEP, TrainConfig

# Progress at which training reaches the full image size, as in the recipes that this schedule comes from.
FULL_SIDE_FROM = 0.75


class Segment(NamedTuple):
    """Progress grows linearly from `progress` at step `start` to 1 at step `end`.

    If `end` equals `start`, training stops there.
    """

    start: int
    progress: float
    end: int


class Timeline:
    """Progress before each step of a training: continuous, linear in each segment.

    A step belongs to the last segment that begins at or before it, so a new segment does not change earlier steps.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = [Segment(*segment) for segment in segments]

    @classmethod
    def of_steps(cls, steps: int) -> Timeline:
        """The timeline of a training of `steps` steps."""
        return cls([Segment(0, 0.0, steps)])

    @property
    def end(self) -> int:
        """Total steps of the training, as currently planned."""
        return self.segments[-1].end

    def progress(self, step: int) -> float:
        """Completed fraction of the training before a step, in [0, 1]."""
        start, progress, end = next(s for s in reversed(self.segments) if s.start <= step)
        return progress + (1 - progress) * (step - start) / (end - start) if step < end else 1.0

    def replan(self, start: int, end: int) -> Segment:
        """From step `start` on, end at step `end` instead; returns the new segment."""
        self.segments.append(Segment(start, self.progress(start), end))
        return self.segments[-1]


def lr_at(config: TrainConfig, progress: float, epoch: int) -> float:
    """The learning rate at `progress`, in an epoch; only milestones use the epoch.

    The linear schedule rises from 0 to `lr` over `warmup_epochs`, then falls to 0 at progress 1.
    """
    if config.schedule == "milestones":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    peak = config.warmup_epochs / config.epochs
    if progress < peak:
        return config.lr * progress / peak
    return config.lr * max(0.0, 1 - progress) / (1 - peak)


def side_starts(config: TrainConfig) -> list[tuple[float, int]]:
    """(progress, image size): the image sizes of a training, and the progress at which each begins.

    Sizes are 32 pixels apart if `start_size` and `image_size` differ by a multiple of 32, else 16. The full size begins
    at `FULL_SIDE_FROM`; the smaller ones share the progress before it equally.
    """
    if not config.start_size:
        return [(0.0, config.image_size)]
    gap = config.image_size - config.start_size
    sides = range(config.start_size, config.image_size + 1, SIZE_STEP if gap % (2 * SIZE_STEP) else 2 * SIZE_STEP)
    return [(FULL_SIDE_FROM * number / (len(sides) - 1), side) for number, side in enumerate(sides)]


def side_at(config: TrainConfig, progress: float) -> int:
    """The image size at `progress`, pixels."""
    return max(side for start, side in side_starts(config) if start <= progress)


def mean_over_rest(config: TrainConfig, progress: float, at_side: Mapping[int, float]) -> float:
    """Mean over the rest of a training of a quantity that depends on the image size, such as seconds per step."""
    if progress >= 1:
        return at_side[config.image_size]
    starts = [*side_starts(config), (1.0, 0)]
    parts = (
        max(0.0, end - max(start, progress)) * at_side[side] for (start, side), (end, _) in itertools.pairwise(starts)
    )
    return sum(parts) / (1 - progress)
