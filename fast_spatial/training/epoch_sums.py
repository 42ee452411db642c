"""What an epoch counts: loss, accuracy, and which views were chosen. A checkpoint within an epoch holds it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast_spatial.kernels.sampling import TRAINING, Views, draw_warps, pack_key
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime.distributed import all_reduce_sum
from fast_spatial.runtime.metrics import Tally
from fast_spatial.training.step import StepResult

# Even, so that 0 is the edge of two bins.
_BINS = 12


class ChosenViews:
    """How often worst-of-k chose the untransformed view, and each rotation and translation.

    The draws of a view are a function of (seed, epoch, index). So a step keeps no more than the numbers of its images
    and of the chosen views, which stay on the device until the counts are read.

    Args:
        views: the views of each image.
        seed: the training's seed.
        epoch: the epoch.

    """

    def __init__(self, views: Views, seed: int, epoch: int) -> None:
        self._views, self._key, self._epoch = views, pack_key(TRAINING, seed), epoch
        self._steps: list[tuple[Tensor, Tensor]] = []
        # All images, those with the untransformed view, then bins of rotations, and of translations along x and y.
        self._counts = np.zeros(2 + 3 * _BINS, np.int64)

    def add(self, index: Tensor, choice: Tensor) -> None:
        """Add a step: positions of the images in the split, int64 [B], and of their chosen views, int64 [B]."""
        self._steps.append((index.clone(), choice))  # a copy: `index` may be a column of a larger array

    def state(self, device: torch.device) -> list[int]:
        """The counts over all processes, for `load`; a collective call, which synchronizes the device."""
        self._count()
        return all_reduce_sum(torch.from_numpy(self._counts).to(device, copy=True)).tolist()  # type: ignore[no-any-return]

    def load(self, state: list[int]) -> None:
        """Restore the counts of `state`; on one process only, since they cover all processes."""
        self._counts[:] = state

    def _count(self) -> None:
        if not self._steps:
            return
        indices, choices = (torch.cat(part).cpu().numpy() for part in zip(*self._steps))
        self._steps.clear()
        warps_B3 = draw_warps(self._key, self._epoch, indices, choices, self._views)
        warped = (choices > 0) | (not self._views.untouched_first)
        self._counts[:2] += len(warped), len(warped) - warped.sum()
        limits = self._views.limits
        for number, limit in enumerate((limits.degrees, limits.translate, limits.translate)):
            if limit:  # else all values are 0
                counts, _ = np.histogram(warps_B3[warped, number], _BINS, (-limit, limit))
                self._counts[2 + number * _BINS :][:_BINS] += counts


def as_record(counts: list[int], views: Views) -> dict[str, Any]:
    """The log's record of `ChosenViews.state`.

    Keys:
        untransformed_pct: share of the untransformed view, percent.
        degrees, tx_px, ty_px: counts in equal bins between the limits, of the other views.
        limit_degrees, limit_px: the limits; pixels at image size 224.
    """
    images, untransformed, *bins = counts
    degrees, tx, ty = (bins[number * _BINS :][:_BINS] for number in range(3))
    return {
        "untransformed_pct": round(100 * untransformed / max(images, 1), 2),
        "degrees": degrees,
        "tx_px": tx,
        "ty_px": ty,
        "limit_degrees": views.limits.degrees,
        "limit_px": round(views.limits.translate_px, 3),
    }


class EpochSums:
    """The running sums of one epoch, of this process.

    Args:
        views: the views of each image.
        seed: the training's seed.
        epoch: the epoch.
        device: the device of this process.

    """

    def __init__(self, views: Views, seed: int, epoch: int, device: torch.device) -> None:
        self._device, self._views = device, views
        self._tally = Tally(device, "loss", "top1")
        self._chosen = ChosenViews(views, seed, epoch) if len(views) > 1 else None

    def add(self, batch: Batch, result: StepResult) -> None:
        """Add a step; does not synchronize the device."""
        self._tally.add(result.loss, result.correct)
        if self._chosen is not None:
            self._chosen.add(batch.index, result.choice)

    def means(self, *, over_ranks: bool) -> dict[str, float]:
        """`loss` and `top1`, a share, of the trained views; synchronizes the device."""
        return self._tally.means(over_ranks=over_ranks)

    def chosen(self) -> dict[str, Any] | None:
        """The log's record of the chosen views of all processes, or None without a choice; a collective call."""
        return None if self._chosen is None else as_record(self._chosen.state(self._device), self._views)

    def state_dict(self) -> dict[str, Any]:
        """The sums over all processes; a collective call, which synchronizes the device."""
        return {
            "tally": self._tally.state(),
            "chosen": None if self._chosen is None else self._chosen.state(self._device),
        }

    def load_state_dict(self, saved: dict[str, Any], *, leads: bool) -> None:
        """Restore `state_dict` on all processes. One of them `leads` and takes the sums, which cover all of them."""
        if not saved.get("chosen"):  # of an earlier version: counts of the rest of an epoch would mislead
            self._chosen = None
        if leads:
            self._tally.load(saved["tally"])
            if self._chosen is not None:
                self._chosen.load(saved["chosen"])
