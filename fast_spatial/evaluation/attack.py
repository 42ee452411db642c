"""Judging of views: the worst view of a training batch, the verdicts of an evaluation, and the grid attack.

B images, V views, S image size, K classes, N views in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fast_spatial.evaluation.forward import BatchedForward
from fast_spatial.kernels.limits import GRID_VIEWS, SpatialLimits
from fast_spatial.kernels.spatial import GRID_IDENTITY, grid, matrices


def losses_of(logits_BVK: Tensor, labels_B: Tensor) -> Tensor:
    """Plain cross-entropy of every view, float32 [B, V]; NaN counts as infinite."""
    B, V, K = logits_BVK.shape
    labels_N = labels_B[:, None].expand(B, V).reshape(-1)
    losses = cross_entropy(logits_BVK.reshape(B * V, K), labels_N, reduction="none").view(B, V)
    return losses.nan_to_num(nan=float("inf"), posinf=float("inf"))


def margins_of(logits_BVK: Tensor, labels_B: Tensor) -> Tensor:
    """Logit margin of every view, float32 [B, V]: the label's logit minus the largest other logit."""
    labels_BV1 = labels_B[:, None, None].expand(*logits_BVK.shape[:2], 1)
    others_BV = logits_BVK.scatter(2, labels_BV1, float("-inf")).amax(dim=2)
    return logits_BVK.gather(2, labels_BV1)[:, :, 0] - others_BV


def worst_view(losses_BV: Tensor) -> Tensor:
    """The view of highest loss of each image, int64 [B]; the first one on ties."""
    V = losses_BV.shape[1]
    candidates = torch.arange(V, device=losses_BV.device).expand_as(losses_BV)
    highest = losses_BV.amax(dim=1, keepdim=True)
    return torch.where(losses_BV == highest, candidates, V).amin(dim=1)


def take_views(views_BVSSC: Tensor, choice_B: Tensor) -> Tensor:
    """One view of each image, [B, S, S, 3]."""
    return views_BVSSC[torch.arange(len(choice_B), device=views_BVSSC.device), choice_B]


class Verdicts(NamedTuple):
    """Verdicts of a batch: booleans [B], True where correct, and the natural view's loss, top-5 and margin, [B].

    Views are the untouched image, then the random ones: `natural` is view 0, `random` is view 1, `worst` is the view of
    highest loss, `all_views` is True if every view is correct. `margin`, float32 [B], is the smallest difference that
    decides these verdicts: a view's absolute logit margin, or the gap between the highest loss and the highest loss
    among views of the opposite verdict.
    """

    natural: Tensor
    random: Tensor
    worst: Tensor
    all_views: Tensor
    natural_loss: Tensor
    natural_top5: Tensor
    natural_margin: Tensor
    margin: Tensor


def verdicts(logits_BVK: Tensor, labels_B: Tensor) -> Verdicts:
    """The verdicts of a batch from the logits, float32 [B, V, K], of its views."""
    correct_BV = logits_BVK.argmax(dim=2) == labels_B[:, None]
    losses_BV = losses_of(logits_BVK, labels_B)
    worst = correct_BV.gather(1, worst_view(losses_BV)[:, None])[:, 0]
    other = losses_BV.masked_fill(correct_BV == worst[:, None], float("-inf")).amax(dim=1)
    top = logits_BVK[:, 0].topk(min(5, logits_BVK.shape[2]), dim=1)
    return Verdicts(
        natural=correct_BV[:, 0],
        random=correct_BV[:, min(1, correct_BV.shape[1] - 1)],
        worst=worst,
        all_views=correct_BV.all(dim=1),
        natural_loss=losses_BV[:, 0],
        natural_top5=(top.indices == labels_B[:, None]).any(dim=1),
        natural_margin=top.values[:, 0] - top.values[:, 1],
        margin=torch.minimum(margins_of(logits_BVK, labels_B).abs().amin(dim=1), losses_BV.amax(dim=1) - other),
    )


@dataclass(frozen=True)
class GridVerdict:
    """Whether an image was right on all 775 views, the number of judged views, and the deciding margin.

    A survivor's margin is the smallest over its views. A broken image's margin is the largest over the views that broke
    it in the last forward pass.
    """

    index: int
    survived: bool
    views_judged: int
    margin: float


@dataclass
class _Survivor:
    image: Tensor
    label: int
    index: int
    order: NDArray[np.int64]
    tried: int = 0
    margin: float = float("inf")


class GridSurvivors:
    """The exhaustive attack on a stream of images. A pool of images keeps every forward pass full and of one shape.

    Add only images whose untouched view is right: it is a point of the grid. `take_verdicts` returns whether each image
    survived all 775 views. Views that broke many images are tried first; this order changes the cost, never the
    verdict. An image that has survived many views gets more views per pass. So early images are settled first, and a
    broken image is judged on at most about twice the views that it needs.

    Args:
        passes: forward passes of one shape.
        limits: limits of the grid.
        side: image size in pixels.
        moved: called before every forward pass.

    """

    # Few, so that the pass that breaks an image wastes few views. More than one, since packing an image costs time.
    _VIEWS_PER_ROW = 4

    def __init__(
        self,
        passes: BatchedForward,
        limits: SpatialLimits,
        side: int,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self._passes, self._moved = passes, moved
        self._batch = passes.size
        self._row = min(self._VIEWS_PER_ROW, self._batch)
        params = grid(limits)
        self._matrices = torch.from_numpy(matrices(params, side))
        extent = np.abs(params) / np.maximum(np.abs(params).max(axis=0), 1e-12)
        self._broke = np.sqrt((extent**2).sum(axis=1) / 3)  # a prior worth one image: far views first
        self._met = np.ones(GRID_VIEWS)
        self._pool: list[_Survivor] = []
        self._settled: list[GridVerdict] = []

    @property
    def pending(self) -> int:
        """Number of images without a verdict."""
        return len(self._pool)

    def take_verdicts(self) -> list[GridVerdict]:
        """The verdicts of the images settled since the last call."""
        settled, self._settled = self._settled, []
        return settled

    def add(self, images_BSSC: Tensor, labels: list[int], indices: list[int]) -> None:
        """Add images, and judge while the pool fills a forward pass."""
        for image, label, index in zip(images_BSSC, labels, indices):
            order = np.argsort(-self._broke / self._met, kind="stable")
            self._pool.append(_Survivor(image, label, index, order[order != GRID_IDENTITY]))
        while len(self._pool) * self._row >= self._batch:
            self.turn()

    def finish(self) -> None:
        """Settle all images."""
        while self.pending:
            self.turn()

    def turn(self) -> None:
        """Run one forward pass, over some views of each of the first images of the pool."""
        self._moved()
        playing = self._shares()
        rows = [image for image, (_, share) in enumerate(playing) for _ in range(share)]
        chosen = [
            survivor.order[np.minimum(survivor.tried + np.arange(share * self._row), GRID_VIEWS - 2)]
            for survivor, share in playing
        ]
        images_RSSC = torch.stack([survivor.image for survivor, _ in playing])[rows]
        matrices_RV23 = self._matrices[np.concatenate(chosen).reshape(-1, self._row)].to(images_RSSC.device)
        logits_RVK = self._passes.warped(images_RSSC, matrices_RV23)
        labels_R = torch.tensor([survivor.label for survivor, _ in playing], device=logits_RVK.device)[rows]
        wrong_RV = logits_RVK.argmax(dim=2) != labels_R[:, None]
        margins_RV = margins_of(logits_RVK, labels_R).abs()
        wrong_N, margins_N = torch.stack([wrong_RV, margins_RV]).flatten(1).cpu().numpy()  # in one transfer
        wrong_N = wrong_N.astype(bool)
        ends = np.cumsum([len(views) for views in chosen])[:-1]
        finished = set()
        for (survivor, _), views, wrong, margins in zip(
            playing, chosen, np.split(wrong_N, ends), np.split(margins_N, ends)
        ):
            np.add.at(self._broke, views, wrong)
            np.add.at(self._met, views, 1)
            survivor.tried += len(views)
            survivor.margin = float(margins[wrong].max() if wrong.any() else min(survivor.margin, margins.min()))
            if wrong.any() or survivor.tried >= GRID_VIEWS - 1:
                views_judged = min(survivor.tried, GRID_VIEWS - 1) + 1  # the natural view was judged before
                self._settled.append(GridVerdict(survivor.index, not wrong.any(), views_judged, survivor.margin))
                finished.add(id(survivor))
        self._pool = [s for s in self._pool if id(s) not in finished]

    def _shares(self) -> list[tuple[_Survivor, int]]:
        """The images of the next forward pass and the rows of each: as many as it has had so far, if they fit."""
        left = self._batch // self._row
        shares = []
        for place, survivor in enumerate(self._pool):
            fair = left // (len(self._pool) - place)
            missing = -(-(GRID_VIEWS - 1 - survivor.tried) // self._row)
            share = min(max(1, fair, survivor.tried // self._row), missing, left)
            shares.append((survivor, share))
            left -= share
            if not left:
                break
        return shares
