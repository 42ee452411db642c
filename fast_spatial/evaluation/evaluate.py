"""Judging a model on natural, random, worst-of-10 and exhaustive attacks.

From Python, for any module that takes images in [0, 1]: see `evaluate`. From the command line: `launch.py evaluate`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fast_spatial.config.commands import EvaluateConfig
from fast_spatial.config.fields import to_json
from fast_spatial.config.modes import DIGITS
from fast_spatial.errors import UserError
from fast_spatial.evaluation.attack import GridSurvivors, GridVerdict
from fast_spatial.evaluation.deadline import RESERVE_SEC, Deadline, TimeUp
from fast_spatial.evaluation.forward import BatchedForward, ModuleJudge, one_shape
from fast_spatial.evaluation.inputs import Inputs, load_model_and_images
from fast_spatial.evaluation.process import JudgingProcess
from fast_spatial.evaluation.verdicts import (
    NEAR_TIE,
    Coverage,
    ImageVerdict,
    Summary,
    add_grid,
    coverage_of,
    judge_grid,
    judge_images,
    summarize,
)
from fast_spatial.kernels.limits import GRID_VIEWS, NOMINAL_SIDE, SpatialLimits
from fast_spatial.kernels.sampling import EVALUATION, Views, draw_matrices, pack_key
from fast_spatial.kernels.warp import warp
from fast_spatial.models.surgery import has_blurpool
from fast_spatial.pipelines.dataset import ImageIndex
from fast_spatial.pipelines.inspection.probe import Choice
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime import distributed
from fast_spatial.runtime.device import exact_float32
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.runlog import say

# Time per image to gather and write verdicts: 50,000 took 1.6 s on one core.
_WRITING_SEC = 5e-5


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
        translate_px: largest translation in pixels at image size 224; by default 24 for 30 degrees, 32 for 40.
        views: number of random views in worst-of-10.
        grid: whether to run the exhaustive attack.
        dtype: precision of the forward passes.
        seed: seed of the random views, which depend only on it and on each image's position.
        judge_batch: views in one forward pass; 0 for 1024 on a GPU, 2^20 pixels' worth on a CPU.

    Raises:
        ValueError: on images outside [0, 1], not square, or none at all.

    """
    limits = SpatialLimits.from_px(degrees, translate_px)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with exact_float32(dtype == torch.float32):
        stream = iter(_views_of(batches, Views(views, limits), pack_key(EVALUATION, seed), device))
        first = next(stream, None)
        if first is None:
            raise ValueError("there is nothing to report: no image was judged")
        passes = one_shape(ModuleJudge(model, dtype), judge_batch, device=device, side=first.side)
        survivors = GridSurvivors(passes, limits, first.side) if grid else None
        found = _judge_stream(passes, itertools.chain([first], stream), survivors)
    return summarize(found, limits, views, partial=False)


def _judge_stream(
    passes: BatchedForward, batches: Iterable[Batch], survivors: GridSurvivors | None
) -> list[ImageVerdict]:
    """All verdicts of batches that come only once: images enter the grid at once (None: no grid)."""
    found: list[ImageVerdict] = []
    for batch in batches:
        verdicts = judge_images(passes, batch)
        found += verdicts
        if survivors is not None:
            right = [row for row, verdict in enumerate(verdicts) if verdict.natural]
            survivors.add(batch.views[right, 0], batch.labels[right].tolist(), batch.index[right].tolist())
    if survivors is None:
        return found
    survivors.finish()
    return add_grid(found, survivors.take_verdicts(), {verdict.index for verdict in found})


def _views_of(
    batches: Iterable[tuple[Tensor, Tensor]], views: Views, key: int, device: torch.device
) -> Iterator[Batch]:
    """Views of a user's images."""
    seen = 0
    for images, labels in batches:
        B, S = images.shape[0], images.shape[-1]
        if images.shape != (B, 3, S, S) or not images.is_floating_point():
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: expected float [B, 3, S, S] in [0, 1]")
        if images.min() < 0 or images.max() > 1:
            raise ValueError(
                "images have values outside [0, 1]; pass pixels, and move the normalization into the model"
            )
        pixels_BSSC = images.to(device).permute(0, 2, 3, 1).mul(255).round().to(torch.uint8).contiguous()
        indices = np.arange(seen, seen + B)
        seen += B
        matrices_BV23 = torch.from_numpy(draw_matrices(key, 0, indices, views, S)).to(device)
        yield Batch(warp(pixels_BSSC, matrices_BV23), labels.to(device), torch.from_numpy(indices))


def published_deviations(config: EvaluateConfig, side: int, *, blurpool: bool) -> tuple[str, ...]:
    """How an evaluation deviates from the published one of ImageNet; the digits have no published image size."""
    found = {
        f"views of {side} px instead of {NOMINAL_SIDE}": side != NOMINAL_SIDE and config.data != DIGITS,
        "logits averaged over every view and its mirror image": config.flip,
        "a network with BlurPool": blurpool,
    }
    return tuple(text for text, so in found.items() if so)


def grid_deviations(per_class: int, cut: int | None) -> tuple[str, ...]:
    """Notes on a grid attack on only some of the images.

    Args:
        per_class: requested images of each class; 0: all.
        cut: images of each class that were finished when time ran out; None: it did not.

    """
    if cut is None:
        return (f"grid on {_of_each(per_class)}",) if per_class else ()
    return (f"grid on the first {_of_each(cut)}: out of time" if cut else "no grid: out of time",)


def _of_each(count: int) -> str:
    return f"{count} {'image' if count == 1 else 'images'} of each class"


def _no_time(config: EvaluateConfig) -> UserError:
    return UserError(
        f"the evaluation ran out of time before one image of every class was judged: {config.checkpoint}",
        f"give a larger budget, or evaluate the checkpoint without a limit: launch.py evaluate --checkpoint "
        f"{config.checkpoint} --data {config.data}",
    )


class _Share(NamedTuple):
    """What one process found.

    Attributes:
        verdicts: the verdicts without the grid.
        grid: the grid's verdicts.
        finished: whether its time sufficed for all of its images.
        failures: a line for each batch that its GPU failed to decode.

    """

    verdicts: list[ImageVerdict]
    grid: list[GridVerdict]
    finished: bool
    failures: list[str]


def evaluate_checkpoint(config: EvaluateConfig, world: World, until: float | None = None) -> None:
    """Judge a checkpoint with all processes; rank 0 prints the table and writes the JSON.

    First all images are judged without the grid, then the grid on those that are right. With a deadline, images come in
    rounds of one image per class. If time runs out, the result covers the rounds that all processes finished, which are
    a fixed subset: the first images of each class.

    Args:
        config: the options of the evaluation.
        world: the process group.
        until: deadline for the written result, in this machine's `time.monotonic()`.

    Raises:
        UserError: on a checkpoint that does not fit, or if time runs out before the first round is finished.

    """
    inputs = load_model_and_images(config)
    left_out = inputs.images.describe_left_out()
    if left_out and world.rank == 0:
        say(left_out)
    shares = distributed.gather(_judge_share(config, inputs, world, until))
    if world.rank == 0:
        found, coverage = _merge(config, inputs, shares)
        summary = _summary(config, inputs, found, coverage)
        say(summary_table(summary))
        if config.json:
            failures = [what for share in shares for what in share.failures]
            write_evaluation_json(Path(config.json), config, summary, found, inputs.images, world.decoding, failures)
    distributed.barrier()


def _judge_share(config: EvaluateConfig, inputs: Inputs, world: World, until: float | None) -> _Share:
    """Judge this process's share of the images: first without the grid, then the grid, as far as time allows."""
    process = JudgingProcess(config, inputs, world, flip=config.flip)
    size = config.batch_size_per_process
    order = None if until is None else inputs.images.balanced_order()
    verdicts: list[ImageVerdict] = []
    finished = False
    with process.working() as moved:
        batches = process.batches(
            "evaluate", size, order=order, warps=config.views, limits=config.limits, seed=config.seed
        )
        deadline = Deadline(until, reserve_sec=RESERVE_SEC + _WRITING_SEC * len(inputs.images))

        def moved_in_time() -> None:
            moved()
            deadline.check()

        survivors = GridSurvivors(process.passes, config.limits, inputs.side, moved_in_time)
        with suppress(TimeUp):
            for batch in deadline.guard(batches):
                verdicts += judge_images(process.passes, batch)
                moved()
            # Every process judges the grid on its own images, so that no verdicts have to be exchanged.
            right = [verdict.index for verdict in verdicts if verdict.natural and verdict.index in inputs.on_grid]
            if right:
                judge_grid(survivors, process.batches("grid", size, order=np.array(right), alone=True))
            finished = True
    return _Share(verdicts, survivors.take_verdicts(), finished, process.failures)


def _merge(config: EvaluateConfig, inputs: Inputs, shares: list[_Share]) -> tuple[list[ImageVerdict], Coverage]:
    """All processes' verdicts on the images that the result covers, in the order of the images."""
    images = inputs.images
    found = sorted((verdict for share in shares for verdict in share.verdicts), key=lambda verdict: verdict.index)
    grid = [verdict for share in shares for verdict in share.grid]
    coverage = coverage_of(images, inputs.on_grid, found, grid)
    if all(share.finished for share in shares) and not (coverage.complete and len(found) == len(images)):
        raise RuntimeError(
            f"{len(found)} verdicts, {len(grid)} of the grid, for {len(images)} images: one is missing or there twice"
        )
    if coverage.rounds == 0:
        raise _no_time(config)
    covered = (verdict for verdict in found if verdict.index in coverage.images)
    return add_grid(covered, grid, coverage.on_grid), coverage


def _summary(config: EvaluateConfig, inputs: Inputs, found: list[ImageVerdict], coverage: Coverage) -> Summary:
    rounds, cut = coverage.rounds, coverage.grid_rounds
    left_out = inputs.images.left_out.names
    limited = config.max_images or config.allow_partial_classes or config.grid_images or left_out
    few = len(inputs.on_grid) < len(inputs.images)
    return summarize(
        found,
        config.limits,
        config.views,
        partial=bool(limited) or rounds is not None,
        grid_per_class=config.grid_per_class if cut is None else cut,
        deviations=(
            *published_deviations(config, inputs.side, blurpool=has_blurpool(inputs.model)),
            *([f"all attacks on the first {_of_each(rounds)}: out of time"] if rounds else []),
            *grid_deviations(config.grid_per_class if few else 0, cut),
        ),
    )


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
            judged += f", {summary.grid_views_per_broken_image:.1f} per image that the grid broke"
        rows.append((f"grid of {GRID_VIEWS}", summary.grid_top1_pct, "right on every view" + few + judged))
    head = (
        f"top-1 accuracy on {summary.num_images} images, up to {summary.degrees:g} degrees and "
        f"{summary.translate_px:g} px (at image size 224)" + (", PARTIAL" if summary.partial else "")
    )
    lines = [head, *(f"  {name:<14}{value:6.1f} %   {note}".rstrip() for name, value, note in rows)]
    if summary.deviations:
        lines.append(f"  not the published protocol: {', '.join(summary.deviations)}")
    if summary.near_ties:
        few = "1 image" if summary.near_ties == 1 else f"{summary.near_ties} images"
        lines.append(
            f"  near ties: {few} with a margin below {NEAR_TIE:g} may flip on other hardware (listed in --json)"
        )
    return "\n".join(lines)


def write_evaluation_json(
    path: Path,
    config: EvaluateConfig,
    summary: Summary,
    found: list[ImageVerdict],
    images: ImageIndex,
    decoding: Choice | None = None,
    decoding_failures: Sequence[str] = (),
) -> None:
    """Write the summary, every image's verdicts, and images that GPUs failed to decode, atomically."""
    rows = []
    for verdict in found:
        values = dataclasses.asdict(verdict)
        del values["index"], values["grid_views"], values["margin"]  # these differ with the number of processes
        rows.append({"path": images.relative_path(verdict.index), **values})
    near_ties = [images.relative_path(verdict.index) for verdict in found if verdict.near_tie]
    content = {
        "summary": dataclasses.asdict(summary),
        "config": to_json(config),
        "near_ties": near_ties,
        "decoding": None if decoding is None else decoding.to_json(),
        "decoding_failures": [*decoding_failures],
        "images": rows,
    }
    write_json(path, content)
