"""From batches to every image's verdicts, and from verdicts to percentages."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from fast_spatial.evaluation.attack import GridSurvivors, GridVerdict, verdicts
from fast_spatial.evaluation.forward import BatchedForward
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.pipelines.dataset import ImageIndex
from fast_spatial.pipelines.loader import Batch

# Below this margin, float32 verdicts may flip with the order of sums: another pass size, or another machine.
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class ImageVerdict:
    """The verdicts of one image; `grid` is None if the image did not meet the grid.

    `natural_margin` is the gap between the two largest logits of the untouched image; near 0, rounding decides.
    `margin` is the smallest deciding margin of its verdicts (`attack.Verdicts`, `attack.GridVerdict`). `grid_views` is
    the number of the grid's 775 views that were judged, the untouched image included.
    """

    index: int
    label: int
    natural: bool
    random: bool
    worst10: bool
    worst10_any: bool
    grid: bool | None
    natural_margin: float
    # These depend on the order of the grid's views, which is learnt during the evaluation.
    margin: float = field(default=float("inf"), compare=False)
    grid_views: int = field(default=0, compare=False)

    @property
    def near_tie(self) -> bool:
        """Whether a verdict may flip when sums are computed in another order."""
        return self.margin < NEAR_TIE


@dataclass(frozen=True)
class Summary:
    """Top-1 accuracy in percent under each attack, over `num_images` distinct images.

    `worst10` counts images that are right on the view of highest loss, among the untouched image and the random views.
    `worst10_any` counts images that are right on all these views. `grid` counts images that are right on all 775 views
    of the grid, over `grid_num_images` images: `grid_per_class` of every class, or all if that is 0.
    `grid_views_per_image` is the average number of judged grid views, `grid_views_per_broken_image` the average over
    images that are right untouched and wrong on another view. `near_ties` counts images with a margin below 1e-4.
    `partial` marks a limited result, such as one on some of the images. `deviations` lists deviations from the
    published protocol.
    """

    natural_top1_pct: float
    random_top1_pct: float
    worst10_top1_pct: float
    worst10_any_top1_pct: float
    grid_top1_pct: float | None
    num_images: int
    grid_num_images: int
    grid_per_class: int
    grid_views_per_image: float | None = field(compare=False)
    grid_views_per_broken_image: float | None = field(compare=False)
    near_ties: int = field(compare=False)
    degrees: float
    translate_px: float
    views: int
    partial: bool
    deviations: tuple[str, ...] = ()


def judge_images(passes: BatchedForward, batch: Batch) -> list[ImageVerdict]:
    """The verdicts of a batch, in its order, without the grid. Views are the untouched image, then random ones."""
    found = verdicts(passes(batch.views), batch.labels)
    tensors = (found.natural, found.random, found.worst, found.all_views, found.natural_margin, found.margin)
    rows = zip(batch.index.tolist(), batch.labels.tolist(), *(tensor.tolist() for tensor in tensors))
    return [
        ImageVerdict(index, label, natural, random, worst, all_views, None, natural_margin, margin)
        for index, label, natural, random, worst, all_views, natural_margin, margin in rows
    ]


def judge_grid(survivors: GridSurvivors, batches: Iterable[Batch]) -> None:
    """Settle images that are right untouched; view 0 of each is the untouched image."""
    for batch in batches:
        survivors.add(batch.views[:, 0], batch.labels.tolist(), batch.index.tolist())
    survivors.finish()


def add_grid(found: Iterable[ImageVerdict], grid: Iterable[GridVerdict], meets: Collection[int]) -> list[ImageVerdict]:
    """The verdicts, with the grid's added.

    Args:
        found: the verdicts without the grid.
        grid: the grid's, at least on the images that meet it and are right untouched.
        meets: positions of the images that meet the grid.

    """
    by_index = {verdict.index: verdict for verdict in grid}
    return [_with_grid(verdict, by_index) if verdict.index in meets else verdict for verdict in found]


def _with_grid(verdict: ImageVerdict, grid: Mapping[int, GridVerdict]) -> ImageVerdict:
    if not verdict.natural:  # the untouched view is one of the 775
        return dataclasses.replace(verdict, grid=False, grid_views=1)
    found = grid[verdict.index]
    margin = min(verdict.margin, found.margin)
    return dataclasses.replace(verdict, grid=found.survived, grid_views=found.views_judged, margin=margin)


@dataclass(frozen=True)
class Coverage:
    """The images that a result covers, by position.

    Attributes:
        images: images with all verdicts but the grid's.
        on_grid: images that meet the grid.
        rounds: images of each class in `images`, if time ran out before all were judged; else None.
        grid_rounds: images of each class in `on_grid`, if time ran out before all were judged; else None.

    """

    images: Collection[int]
    on_grid: Collection[int]
    rounds: int | None = None
    grid_rounds: int | None = None

    @property
    def complete(self) -> bool:
        """Whether nothing is missing that was requested."""
        return self.rounds is None and self.grid_rounds is None


def coverage_of(
    images: ImageIndex, meets: Collection[int], found: list[ImageVerdict], grid: list[GridVerdict]
) -> Coverage:
    """What the verdicts of all processes cover: everything, or the rounds that all processes finished.

    A round is one image of each class, in `ImageIndex.balanced_order`.

    Args:
        images: the split.
        meets: positions of the images that should meet the grid.
        found: the verdicts without the grid.
        grid: the grid's verdicts.

    """
    judged = {verdict.index for verdict in found}
    if len(judged) < len(images):
        rounds = images.balanced_rounds(judged)
        return Coverage(_first(images, rounds), set(), rounds, 0 if meets else None)
    settled = {v.index for v in found if v.index in meets and not v.natural} | {v.index for v in grid}
    if len(settled) < len(meets):
        rounds = images.balanced_rounds(settled)
        return Coverage(judged, _first(images, rounds), grid_rounds=rounds)
    return Coverage(judged, meets)


def _first(images: ImageIndex, rounds: int) -> set[int]:
    return set(images.balanced_positions(rounds).tolist())


def summarize(
    found: list[ImageVerdict],
    limits: SpatialLimits,
    views: int,
    *,
    partial: bool,
    grid_per_class: int = 0,
    deviations: tuple[str, ...] = (),
) -> Summary:
    """Percentages over distinct images.

    Raises:
        ValueError: if there are none, or an image was judged twice.

    """
    if not found:
        raise ValueError("there is nothing to report: no image was judged")
    if len({v.index for v in found}) != len(found):
        raise ValueError("an image was judged more than once; the percentages would be wrong")
    on_grid = [v for v in found if v.grid is not None]
    broken = [v for v in on_grid if v.natural and not v.grid]

    def mean_views(values: list[ImageVerdict]) -> float | None:
        return sum(v.grid_views for v in values) / len(values) if values else None

    def pct(values: list[bool | None]) -> float:
        return 100 * sum(map(bool, values)) / len(values)

    return Summary(
        natural_top1_pct=pct([v.natural for v in found]),
        random_top1_pct=pct([v.random for v in found]),
        worst10_top1_pct=pct([v.worst10 for v in found]),
        worst10_any_top1_pct=pct([v.worst10_any for v in found]),
        grid_top1_pct=pct([v.grid for v in on_grid]) if on_grid else None,
        num_images=len(found),
        grid_num_images=len(on_grid),
        grid_per_class=grid_per_class,
        grid_views_per_image=mean_views(on_grid),
        grid_views_per_broken_image=mean_views(broken),
        near_ties=sum(v.near_tie for v in found),
        degrees=limits.degrees,
        translate_px=limits.translate_px,
        views=views,
        partial=partial,
        deviations=deviations,
    )
