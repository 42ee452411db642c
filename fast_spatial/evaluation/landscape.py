"""The landscape: loss and verdict of all 775 grid views, on a fixed, class-balanced subset.

An evaluation stops at an image's first wrong view. That counts survivors, but does not show how loss and accuracy
depend on angle and translation. This pass judges all views of a few images and writes:

    OUT/landscape.json    the limits, the names of the images, and the sample pictures with their views
    OUT/landscape.npz     loss float16 [N, 775], correct as bits, uint8 [N, 97], in the order of `kernels.spatial.grid`
    OUT/landscape/*.jpg   some of the images, untouched and as their worst view

Its cost is 775 views per image, shared by all processes. B images of a batch, N images in all, G views of the grid, S
image size, K classes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fast_spatial.config.commands import DEFAULT_IMAGES, LandscapeConfig
from fast_spatial.config.fields import to_json
from fast_spatial.data.loading import evaluation_loader
from fast_spatial.data.placing import placement_of
from fast_spatial.errors import UserError
from fast_spatial.evaluation import inputs
from fast_spatial.evaluation.attack import losses_of, worst_view
from fast_spatial.evaluation.deadline import Deadline, TimeUp
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward, default_judge_batch
from fast_spatial.kernels.limits import NOMINAL_SIDE, SpatialLimits
from fast_spatial.kernels.spatial import GRID_IDENTITY, GRID_VIEWS, grid, matrices
from fast_spatial.kernels.warp import warp
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.dataset import ImageIndex
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime import distributed
from fast_spatial.runtime.device import dtype_of, seed_everything
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.files import write_atomically, write_json
from fast_spatial.runtime.run_files import LANDSCAPE, LANDSCAPE_ARRAYS, LANDSCAPE_PICTURES
from fast_spatial.runtime.runlog import Bar, say
from fast_spatial.runtime.signals import stop_requests

SAMPLES = 8
# Few, so that a signal is handled soon and a deadline wastes little. Enough that the last pass is nearly full.
PASSES_PER_BATCH = 4
_LARGEST_FLOAT16 = 65504.0
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class ImageLandscape:
    """All views of one image: loss [G], correct [G], the predicted class of the view of highest loss."""

    index: int
    loss: NDArray[np.float16]
    correct: NDArray[np.bool_]
    worst_view: int
    worst_predicted: int


def load_model_and_subset(config: LandscapeConfig) -> tuple[Classifier, ImageIndex, int, int]:
    """The validated model, images, number of judged images per class, and image size.

    Raises:
        UserError: on a checkpoint that does not fit, or a class with too few images.

    """
    model, images, _, side = inputs.load_model_and_images(config.judged)
    counts = images.class_counts()
    per_class = config.images_per_class or min(int(counts.min()), max(1, DEFAULT_IMAGES // len(counts)))
    try:
        images.balanced_positions(per_class)
    except ValueError as error:
        raise UserError(f"--images-per-class {per_class}: {error}") from None
    return model, images, per_class, side


def landscape(config: LandscapeConfig, world: World, until: float | None = None) -> None:
    """Judge all views of the subset with all processes; rank 0 writes the result.

    Images are judged in rounds of one image per class. If time runs out, the result covers the finished rounds, as if
    fewer images of each class had been requested. Without a finished round, nothing is written.

    Args:
        config: the options of the landscape.
        world: the process group.
        until: deadline for the written result, in this machine's `time.monotonic()`.

    """
    seed_everything(0, deterministic=False)
    torch.backends.cudnn.benchmark = False
    dtype = dtype_of(config.dtype, world.device)
    model, images, per_class, side = load_model_and_subset(config)
    start = time.monotonic()
    passes = BatchedForward(
        FoldedJudge(model.to(world.device), dtype),
        config.views_per_forward or default_judge_batch(world.device, side),
        pad=True,
    )
    batch_size = max(1, PASSES_PER_BATCH * passes.size // GRID_VIEWS)
    placement = placement_of(config, world, exact=True)
    failed: list[str] = []

    def failed_on_gpu(what: str) -> None:
        say(what)
        failed.append(f"process {world.rank}: {what}")

    load = partial(
        evaluation_loader,
        images,
        side=side,
        threads=config.workers,
        placement=placement,
        on_gpu_failure=failed_on_gpu,
    )
    loader = load(world=world, batch_size_per_process=batch_size, order=images.balanced_positions(per_class))
    bar = Bar(
        loader.epoch(0),
        total=loader.steps_per_epoch,
        images_per_batch=batch_size * world.world_size,
        title="landscape",
        show=world.rank == 0,
    )
    mine: list[ImageLandscape] = []
    with stop_requests() as request:

        def moved() -> None:
            distributed.reset_watchdog(config.stall_minutes)
            request.obey()

        with suppress(TimeUp):
            for image in judge_all_views(passes, Deadline(until).guard(bar), config.limits, side, moved=moved):
                mine.append(image)
    distributed.reset_watchdog(4 * config.stall_minutes)
    parts = distributed.gather((mine, failed))
    if world.rank == 0:
        found = {image.index: image for part, _ in parts for image in part}
        finished = images.balanced_rounds(found)
        if len(found) < sum(len(part) for part, _ in parts) or (until is None and finished < per_class):
            raise RuntimeError(
                f"{len(found)} images were judged, or one of them twice; expected {per_class} of each class"
            )
        if finished:
            kept = np.sort(images.balanced_positions(finished))
            sampled = sample_positions(len(kept))
            alone = dataclasses.replace(world, rank=0, world_size=1)
            (batch,) = load(world=alone, batch_size_per_process=len(sampled), order=kept[sampled]).epoch(0)
            samples = list(zip(sampled, batch.views[:, 0].cpu().numpy()))
            gpus = world.world_size if world.device.type == "cuda" else 0
            seconds = time.monotonic() - start
            subset = images.balanced_subset(finished)
            failures = [*failed, *(what for _, part in parts[1:] for what in part)]  # including failures on the samples
            write(
                config,
                subset,
                side,
                [found[i] for i in kept.tolist()],
                samples,
                seconds=seconds,
                gpus=gpus,
                decoding_failures=failures,
            )
        else:
            say("skipped the landscape: out of time")
    distributed.barrier()


def sample_positions(count: int) -> list[int]:
    """The images whose pictures are kept, spread evenly over a subset in the order of its classes."""
    return sorted({int(position) for position in np.linspace(0, count - 1, min(SAMPLES, count))})


def judge_all_views(
    passes: BatchedForward,
    batches: Iterable[Batch],
    limits: SpatialLimits,
    side: int,
    *,
    moved: Callable[[], None] = lambda: None,
) -> Iterator[ImageLandscape]:
    """Loss and verdict of all grid views, for batches whose first view is the untouched image.

    Args:
        passes: computes the logits.
        batches: batches of images with this image size.
        limits: limits of the grid.
        side: image size in pixels.
        moved: called after every batch.

    """
    matrices_G23 = torch.from_numpy(matrices(grid(limits), side))
    for batch in batches:
        images_BSSC = batch.views[:, 0]
        matrices_BG23 = matrices_G23.to(images_BSSC.device).expand(len(images_BSSC), -1, -1, -1)
        logits_BGK = passes.warped(images_BSSC, matrices_BG23)
        predicted_BG = logits_BGK.argmax(dim=2)
        losses_BG = losses_of(logits_BGK, batch.labels)
        worst_B = worst_view(losses_BG)
        columns = (
            losses_BG.clamp(max=_LARGEST_FLOAT16).half(),
            predicted_BG == batch.labels[:, None],
            worst_B,
            predicted_BG.gather(1, worst_B[:, None])[:, 0],
        )
        for index, loss, correct, worst, said in zip(batch.index.tolist(), *(c.cpu().numpy() for c in columns)):
            yield ImageLandscape(index, loss, correct, int(worst), int(said))
        moved()


def write(
    config: LandscapeConfig,
    images: ImageIndex,
    side: int,
    found: list[ImageLandscape],
    samples: list[tuple[int, NDArray[np.uint8]]],
    *,
    seconds: float,
    gpus: int,
    decoding_failures: Sequence[str] = (),
) -> None:
    """Write the arrays and the pictures, and last the JSON that names them.

    Args:
        config: the options of the landscape.
        images: the subset.
        side: image size in pixels.
        found: the landscape of every image, in the subset's order.
        samples: positions of images whose pictures are kept, and their pixels, uint8 [S, S, 3].
        seconds: wall-clock time of the pass.
        gpus: number of GPUs of the pass; 0 on CPUs.
        decoding_failures: a line for each image that a GPU failed to decode.

    """
    out, limits = Path(config.out), config.limits
    params = grid(limits)
    (out / LANDSCAPE_PICTURES).mkdir(parents=True, exist_ok=True)
    loss = np.stack([image.loss for image in found])
    correct = np.stack([image.correct for image in found])
    bits = np.packbits(correct, axis=1)
    write_atomically(out / LANDSCAPE_ARRAYS, lambda file: np.savez_compressed(file, loss=loss, correct=bits))
    paths = [images.relative_path(index) for index in range(len(found))]
    classes = [Path(path).parent.name for path in paths]
    outputs = dict(zip(images.labels.tolist(), classes))
    described = []
    for index, pixels in samples:
        image = found[index]
        matrix_23 = matrices(params[image.worst_view], side)
        warped = warp(torch.from_numpy(pixels)[None], torch.from_numpy(matrix_23)[None, None])[0, 0]
        names = [f"{LANDSCAPE_PICTURES}/{index:05d}_{kind}.jpg" for kind in ("untouched", "worst")]
        for name, shown in zip(names, (torch.from_numpy(pixels), warped)):
            _write_jpeg(out / name, shown)
        degrees, tx, ty = params[image.worst_view] * (1, NOMINAL_SIDE, NOMINAL_SIDE)
        described.append(
            {
                "image": index,
                "untouched": names[0],
                "worst": names[1],
                "worst_view": image.worst_view,
                "degrees": round(float(degrees), 3),
                "tx_px": round(float(tx), 3),
                "ty_px": round(float(ty), 3),
                "untouched_loss": float(image.loss[GRID_IDENTITY]),
                "worst_loss": float(image.loss[image.worst_view]),
                "worst_predicted": outputs.get(image.worst_predicted, f"output {image.worst_predicted}"),
            }
        )
    content = {
        "config": to_json(config),
        "degrees": limits.degrees,
        "translate_px": limits.translate_px,
        "side": side,
        "num_images": len(found),
        "images_per_class": int((images.labels == images.labels[0]).sum()),
        "seconds": round(seconds, 1),
        "gpus": gpus,
        "decoding_failures": [*decoding_failures],
        "natural_top1_pct": 100 * float(correct[:, GRID_IDENTITY].mean()),
        "grid_top1_pct": 100 * float(correct.all(axis=1).mean()),
        "images": [{"path": path, "class": name} for path, name in zip(paths, classes)],
        "samples": described,
    }
    write_json(out / LANDSCAPE, content)
    say(
        f"all {GRID_VIEWS} views of {len(found)} images: {content['natural_top1_pct']:.1f} % right untouched, "
        f"{100 * float(correct.mean()):.1f} % of all views, {content['grid_top1_pct']:.1f} % right on every view; "
        f"written to {out / LANDSCAPE}"
    )


def _write_jpeg(path: Path, pixels: Tensor) -> None:
    from PIL import Image

    picture = Image.fromarray(pixels.numpy())
    write_atomically(path, lambda file: picture.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0))
