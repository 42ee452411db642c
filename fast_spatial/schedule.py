"""The learning rate and the side of a training, as pure functions of how far it is.

Progress is the fraction of the training that is done, in [0, 1]; without a budget, steps done / all steps. Everything
here depends on it alone, so a training that is cut to a deadline still ends its decay at the deadline. Milestones are
the exception: they are epochs, as published, and are never rescaled.
"""

from __future__ import annotations

from fast_spatial.config import SIDE_STEP, TrainConfig

# From here on, training is at the full side: the progress of the recipes that this style comes from.
FULL_SIDE_FROM = 0.75


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
    if not config.start_side:
        return [(0.0, config.side)]
    gap = config.side - config.start_side
    sides = range(config.start_side, config.side + 1, SIDE_STEP if gap % (2 * SIDE_STEP) else 2 * SIDE_STEP)
    return [(FULL_SIDE_FROM * number / (len(sides) - 1), side) for number, side in enumerate(sides)]


def side_at(config: TrainConfig, progress: float) -> int:
    """The side of the views of the step after `progress`, pixels."""
    return max(side for start, side in side_starts(config) if start <= progress)
