"""Judging a model on natural, random, worst-of-10 and exhaustive attacks, in one pass over the images.

From Python, for any module that takes images in [0, 1]: see `evaluate`. From the command line: `launch.py evaluate`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fast_spatial import distributed
from fast_spatial.attack import GridSurvivors, verdicts
from fast_spatial.config import DIGITS, EvaluateConfig, to_json
from fast_spatial.device import default_pass_size, dtype_of, exact_float32, seed_everything
from fast_spatial.distributed import World
from fast_spatial.files import write_json
from fast_spatial.inputs import prepare
from fast_spatial.model import has_blurpool
from fast_spatial.runlog import Bar, say
from fast_spatial.scoring import FlipJudge, Judge, ModuleJudge, Passes, Scorer
from fast_spatial.stopping import stop_requests
from kernels.limits import NOMINAL_SIDE, SpatialLimits
from kernels.sampling import EVALUATION, augmentation_settings, draw_matrices, pack_key, view_limits
from kernels.spatial import GRID_VIEWS
from kernels.warp import warp
from pipelines.dataset import ImageIndex
from pipelines.loader import Batch, Loader

# Below it, verdicts in float32 may differ where sums are taken in another order: another judging shape or machine.
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class ImageVerdict:
    """What one image survived; `grid` is None where the image did not meet the grid.

    `natural_margin` is the gap between the two largest logits of the untouched image: near 0, arithmetic decides.
    `margin` is the smallest that a verdict hangs on (`attack.Verdicts`, `attack.GridVerdict`). `grid_views` is how many
    of the grid's 775 views were judged to know the answer, the untouched image included.
    """

    index: int
    label: int
    natural: bool
    random: bool
    worst10: bool
    worst10_any: bool
    grid: bool | None
    natural_margin: float
    # These depend on the order in which the grid's views are tried, which is learnt.
    margin: float = field(default=float("inf"), compare=False)
    grid_views: int = field(default=0, compare=False)

    @property
    def near_tie(self) -> bool:
        """Whether a verdict may differ where the same network is computed in another order."""
        return self.margin < NEAR_TIE


@dataclass(frozen=True)
class Summary:
    """Top-1 accuracy in percent under each attack, over `num_images` distinct images.

    `worst10` counts the view of highest loss among the untouched image and the random ones, `worst10_any` is right on
    all of them, `grid` on all 775 views of the grid. `grid_views_per_image` is how many of these were judged, on
    average, to know the answer; `grid_views_per_broken_image` the same of images that are right untouched and broken by
    another view. `near_ties` counts images of which a verdict hangs on a margin below 1e-4. `partial` marks a result
    that was limited on purpose, `deviations` what was otherwise than in the published protocol.
    """

    natural_top1_pct: float
    random_top1_pct: float
    worst10_top1_pct: float
    worst10_any_top1_pct: float
    grid_top1_pct: float | None
    num_images: int
    grid_num_images: int
    grid_views_per_image: float | None = field(compare=False)
    grid_views_per_broken_image: float | None = field(compare=False)
    near_ties: int = field(compare=False)
    degrees: float
    translate_px: float
    views: int
    partial: bool
    deviations: tuple[str, ...] = ()


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    degrees: float = 30.0,
    translate_px: float | None = None,
    views: int = 10,
    grid: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    judge_batch: int = 0,
) -> Summary:
    """Judge any classifier on any images.

    Args:
        model: takes images, float32 [B, 3, S, S] in [0, 1] (its normalization lives inside), and returns logits [B, K].
            It is copied, so its mode, gradients and statistics stay as they are.
        batches: pairs of images, float [B, 3, S, S] in [0, 1], and labels, int64 [B]. Views are made of the images as
            8-bit pixels.
        degrees: largest rotation, either way.
        translate_px: largest translation in pixels at side 224; by default 24 for 30 degrees, 32 for 40.
        views: random views of worst-of-10.
        grid: whether to run the exhaustive attack.
        dtype: arithmetic of the verdicts.
        seed: of the random views, which depend on it and on each image's position alone.
        judge_batch: views in one forward pass; 0 for 1024 on a GPU, 2^20 pixels' worth on a CPU.

    Raises:
        ValueError: on images outside [0, 1], not square, or none at all.

    """
    limits = SpatialLimits.from_px(degrees, translate_px)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    limits_V2 = view_limits(views, untouched_first=True, degrees=limits.degrees, translate=limits.translate)
    with exact_float32(dtype == torch.float32):
        found = list(
            judge_batches(
                ModuleJudge(model, dtype),
                _views_of(batches, limits_V2, pack_key(EVALUATION, seed), device),
                limits,
                judge_batch=judge_batch,
                wants_grid=(lambda index: True) if grid else None,
            )
        )
    return summarize(found, limits, views, partial=False)


def judge_batches(
    judge: Judge,
    batches: Iterable[Batch],
    limits: SpatialLimits,
    *,
    judge_batch: int,
    wants_grid: Callable[[int], bool] | None,
    moved: Callable[[], None] = lambda: None,
) -> Iterator[ImageVerdict]:
    """The verdicts of batches whose views are the untouched image and random ones; in any order.

    Args:
        judge_batch: views in every forward pass: one fixed shape, whatever the batches' sizes; 0: the default.
        wants_grid: whether an image, by index, is to meet the grid; None for no grid at all.
        moved: called after every batch, and every forward pass over the grid.

    """
    passes: Passes | None = None
    survivors: GridSurvivors | None = None
    waiting: dict[int, ImageVerdict] = {}
    for batch in batches:
        if passes is None:
            size = judge_batch or default_judge_batch(batch.views.device, batch.views.shape[2])
            passes = Passes(judge, size, pad=True)
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
                survivors = GridSurvivors(passes, limits, batch.views.shape[2], moved)
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
        verdict = waiting.pop(found.index)
        margin = min(verdict.margin, found.margin)
        yield dataclasses.replace(verdict, grid=found.survived, grid_views=found.views_judged, margin=margin)


def summarize(
    found: list[ImageVerdict],
    limits: SpatialLimits,
    views: int,
    *,
    partial: bool,
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
        grid_views_per_image=mean_views(on_grid),
        grid_views_per_broken_image=mean_views(broken),
        near_ties=sum(v.near_tie for v in found),
        degrees=limits.degrees,
        translate_px=limits.translate_px,
        views=views,
        partial=partial,
        deviations=deviations,
    )


def published_deviations(config: EvaluateConfig, side: int, *, blurpool: bool) -> tuple[str, ...]:
    """What an evaluation does otherwise than the published one of ImageNet; the digits have no published side."""
    found = {
        f"views of {side} px instead of {NOMINAL_SIDE}": side != NOMINAL_SIDE and config.data != DIGITS,
        "logits averaged over every view and its mirror image": config.flip,
        "a network with BlurPool": blurpool,
    }
    return tuple(text for text, so in found.items() if so)


def default_judge_batch(device: torch.device, side: int) -> int:
    """Views in one forward pass, whose shape is fixed."""
    return default_pass_size(device, side) or 1024


def _views_of(
    batches: Iterable[tuple[Tensor, Tensor]], limits_V2: np.ndarray[Any, Any], key: int, device: torch.device
) -> Iterator[Batch]:
    """Views of a user's images."""
    seen = 0
    for images, labels in batches:
        B, S = images.shape[0], images.shape[-1]
        if images.shape != (B, 3, S, S) or not images.is_floating_point():
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: expected float [B, 3, S, S] in [0, 1]")
        if images.min() < 0 or images.max() > 1:
            raise ValueError("images reach outside [0, 1]; give pixels, and put the normalization into the model")
        pixels_BSSC = images.to(device).permute(0, 2, 3, 1).mul(255).round().to(torch.uint8).contiguous()
        indices = np.arange(seen, seen + B)
        seen += B
        matrices_BV23 = torch.from_numpy(draw_matrices(key, 0, indices, limits_V2, S)).to(device)
        yield Batch(warp(pixels_BSSC, matrices_BV23), labels.to(device), torch.from_numpy(indices))


def evaluate_checkpoint(config: EvaluateConfig, world: World) -> None:
    """Judge a checkpoint with all processes; rank 0 prints the table and writes the JSON."""
    seed_everything(0, deterministic=False)
    torch.backends.cudnn.benchmark = False  # verdicts should not depend on which algorithm won a race
    dtype = dtype_of(config.dtype, world.device)
    model, images, on_grid, side = prepare(config)
    left_out = images.describe_left_out()
    if left_out and world.rank == 0:
        say(left_out)
    limits = config.limits
    loader = Loader(
        images,
        limits=view_limits(config.views, untouched_first=True, degrees=limits.degrees, translate=limits.translate),
        settings=augmentation_settings(center=True),
        side=side,
        global_batch_size=config.batch_size_per_process * world.world_size,
        key=pack_key(EVALUATION, config.seed),
        train=False,
        rank=world.rank,
        world_size=world.world_size,
        threads=config.workers or None,
        device=world.device,
    )
    judge: Judge = Scorer(model.to(world.device), dtype)
    bar = Bar(
        loader.epoch(0),
        total=loader.steps_per_epoch,
        images_per_batch=config.batch_size_per_process * world.world_size,
        title="evaluate",
        show=world.rank == 0,
    )
    wants_grid = None
    if config.grid:
        wants_grid = (lambda index: True) if on_grid is None else on_grid.__contains__
    with stop_requests() as request:

        def moved() -> None:
            distributed.progress(config.stall_minutes)
            request.obey()

        mine = list(
            judge_batches(
                FlipJudge(judge) if config.flip else judge,
                bar,
                limits,
                judge_batch=config.judge_batch,
                wants_grid=wants_grid,
                moved=moved,
            )
        )
    distributed.progress(4 * config.stall_minutes)  # others may have more survivors
    found = sorted((v for part in distributed.gather(mine) for v in part), key=lambda v: v.index)
    if world.rank == 0:
        if [v.index for v in found] != list(range(len(images))):
            raise RuntimeError(f"{len(found)} verdicts for {len(images)} images: an image was missed or judged twice")
        limited = config.max_images or config.allow_partial_classes or images.left_out.names
        partial = bool(limited) or on_grid is not None
        deviations = published_deviations(config, side, blurpool=has_blurpool(model))
        summary = summarize(found, limits, config.views, partial=partial, deviations=deviations)
        say(summary_table(summary))
        if config.json:
            write_report(Path(config.json), config, summary, found, images)
    distributed.barrier()


def summary_table(summary: Summary) -> str:
    """The table an evaluation prints."""
    rows = [
        ("natural", summary.natural_top1_pct, ""),
        ("random view", summary.random_top1_pct, ""),
        (f"worst of {summary.views}", summary.worst10_top1_pct, "view of highest loss, the untouched image included"),
        (f"any of {summary.views}", summary.worst10_any_top1_pct, "right on every one of these views"),
    ]
    if summary.grid_top1_pct is not None:
        few = f", {summary.grid_num_images} images" if summary.grid_num_images != summary.num_images else ""
        judged = f"; {summary.grid_views_per_image:.0f} views judged per image"
        if summary.grid_views_per_broken_image is not None:
            judged += f", {summary.grid_views_per_broken_image:.1f} per image they broke"
        rows.append((f"grid of {GRID_VIEWS}", summary.grid_top1_pct, "right on every view" + few + judged))
    head = (
        f"top-1 accuracy on {summary.num_images} images, up to {summary.degrees:g} degrees and "
        f"{summary.translate_px:g} px (at side 224)" + (", PARTIAL" if summary.partial else "")
    )
    lines = [head, *(f"  {name:<14}{value:6.1f} %   {note}".rstrip() for name, value, note in rows)]
    if summary.deviations:
        lines.append(f"  not the published protocol: {', '.join(summary.deviations)}")
    if summary.near_ties:
        few = "an image hangs" if summary.near_ties == 1 else f"{summary.near_ties} images hang"
        lines.append(f"  {few} on a margin below {NEAR_TIE:g} and may be judged otherwise elsewhere (listed in --json)")
    return "\n".join(lines)


def write_report(
    path: Path, config: EvaluateConfig, summary: Summary, found: list[ImageVerdict], images: ImageIndex
) -> None:
    """Write the summary and every image's verdicts, atomically."""
    rows = []
    for verdict in found:
        values = dataclasses.asdict(verdict)
        del values["index"], values["grid_views"], values["margin"]  # the same rows for any number of processes
        rows.append({"path": images.relative_path(verdict.index), **values})
    near_ties = [images.relative_path(verdict.index) for verdict in found if verdict.near_tie]
    content = {
        "summary": dataclasses.asdict(summary),
        "config": to_json(config),
        "near_ties": near_ties,
        "images": rows,
    }
    write_json(path, content)
