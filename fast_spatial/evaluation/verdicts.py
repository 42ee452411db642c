"""From batches to every image's verdicts, and from verdicts to percentages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from fast_spatial.evaluation.attack import GridSurvivors, GridVerdict, verdicts
from fast_spatial.evaluation.deadline import TimeUp
from fast_spatial.evaluation.forward import BatchedForward, Judge, default_judge_batch
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


def judge_batches(
    judge: Judge,
    batches: Iterable[Batch],
    limits: SpatialLimits,
    *,
    judge_batch: int,
    wants_grid: Callable[[int], bool] | None,
    moved: Callable[[], None] = lambda: None,
) -> Iterator[ImageVerdict]:
    """The verdicts of batches, in any order. Views are the untouched image, then random ones.

    Args:
        judge: computes the logits.
        batches: batches of views.
        limits: limits of the grid.
        judge_batch: views per forward pass, one shape for all batches; 0: the default.
        wants_grid: whether an image, by index, meets the grid; None: no grid.
        moved: called after every batch, and before every forward pass over the grid.

    """
    passes: BatchedForward | None = None
    survivors: GridSurvivors | None = None
    waiting: dict[int, ImageVerdict] = {}
    for batch in batches:
        if passes is None:
            size = judge_batch or default_judge_batch(batch.labels.device, batch.side)
            passes = BatchedForward(judge, size, pad=True)
        found = verdicts(passes(batch.views), batch.labels)
        columns = zip(
            batch.index.tolist(),
            batch.labels.tolist(),
            *(t.tolist() for t in (found.natural, found.random, found.worst, found.all_views)),
            *(t.tolist() for t in (found.natural_margin, found.margin)),
        )
        for_grid = []
        for row, (index, label, natural, random, worst, all_views, natural_margin, margin) in enumerate(columns):
            meets = wants_grid is not None and wants_grid(index)
            grid = False if meets else None
            verdict = ImageVerdict(
                index, label, natural, random, worst, all_views, grid, natural_margin, margin, int(meets)
            )
            if meets and natural:
                waiting[index] = verdict
                for_grid.append(row)
            else:
                yield verdict
        if for_grid:
            if survivors is None:
                survivors = GridSurvivors(passes, limits, batch.side, moved)
            images = batch.views[for_grid, 0]
            survivors.add(images, batch.labels[for_grid].tolist(), batch.index[for_grid].tolist())
            yield from _settled(survivors, waiting)
        moved()
    if survivors is not None:
        while survivors.pending:
            survivors.turn()
        yield from _settled(survivors, waiting)
    assert not waiting


def _settled(survivors: GridSurvivors, waiting: dict[int, ImageVerdict]) -> Iterator[ImageVerdict]:
    for found in survivors.take_verdicts():
        yield with_grid(waiting.pop(found.index), found)


def with_grid(verdict: ImageVerdict, found: GridVerdict) -> ImageVerdict:
    """An image's verdicts, with the grid's verdict added."""
    margin = min(verdict.margin, found.margin)
    return dataclasses.replace(verdict, grid=found.survived, grid_views=found.views_judged, margin=margin)


def broken_untouched(index: int) -> GridVerdict:
    """The grid's verdict on an image that is wrong untouched; that view is one of the 775."""
    return GridVerdict(index, survived=False, views_judged=1, margin=float("inf"))


def merge_grid(
    found: list[ImageVerdict], on_time: list[GridVerdict], images: ImageIndex, meets: Collection[int]
) -> tuple[list[ImageVerdict], int | None]:
    """Add the grid's verdicts that were reached in time to all verdicts.

    Args:
        found: the verdicts without the grid.
        on_time: the grid's verdicts, possibly incomplete.
        images: the split.
        meets: positions of the images that should meet the grid.

    Returns:
        All verdicts; and the cut: None if the grid is complete, else the number of images of each class whose grid
        verdicts are kept, the first in `balanced_order`.

    """
    grid = {verdict.index: verdict for verdict in on_time}
    if len(grid) == len(meets):
        kept, cut = meets, None
    else:
        cut = images.balanced_rounds(grid)
        kept = set(images.balanced_positions(cut).tolist())
    return [with_grid(v, grid[v.index]) if v.index in kept else v for v in found], cut


def judge_grid(survivors: GridSurvivors, batches: Iterable[Batch]) -> list[GridVerdict]:
    """The grid's verdicts on images that are right untouched; view 0 of each is the untouched image.

    If the survivors' `moved` raises `TimeUp`, images without a verdict are missing.
    """
    with suppress(TimeUp):
        for batch in batches:
            survivors.add(batch.views[:, 0], batch.labels.tolist(), batch.index.tolist())
        while survivors.pending:
            survivors.turn()
    return survivors.take_verdicts()


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
