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

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fast_spatial.config.commands import DEFAULT_IMAGES, LandscapeConfig
from fast_spatial.config.fields import to_json
from fast_spatial.errors import UserError
from fast_spatial.evaluation import inputs
from fast_spatial.evaluation.attack import losses_of, worst_view
from fast_spatial.evaluation.deadline import Deadline, TimeUp
from fast_spatial.evaluation.forward import BatchedForward
from fast_spatial.evaluation.inputs import Inputs
from fast_spatial.evaluation.process import JudgingProcess
from fast_spatial.kernels.limits import GRID_VIEWS, NOMINAL_SIDE, SpatialLimits
from fast_spatial.kernels.spatial import GRID_IDENTITY, grid, matrices
from fast_spatial.kernels.warp import warp
from fast_spatial.pipelines.dataset import ImageIndex
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.files import write_atomically, write_json
from fast_spatial.runtime.run_files import LANDSCAPE, LANDSCAPE_ARRAYS, LANDSCAPE_PICTURES
from fast_spatial.runtime.runlog import say

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


def load_model_and_subset(config: LandscapeConfig) -> tuple[Inputs, int]:
    """The validated inputs, and the number of judged images per class.

    Raises:
        UserError: on a checkpoint that does not fit, or a class with too few images.

    """
    found = inputs.load_model_and_images(config.judged)
    counts = found.images.class_counts()
    per_class = config.images_per_class or min(int(counts.min()), max(1, DEFAULT_IMAGES // len(counts)))
    try:
        found.images.balanced_positions(per_class)
    except ValueError as error:
        raise UserError(f"--images-per-class {per_class}: {error}") from None
    return found, per_class


def landscape(config: LandscapeConfig, world: World, until: float | None = None) -> None:
    """Judge all views of the subset with all processes; rank 0 writes the result.

    Images are judged in rounds of one image per class. If time runs out, the result covers the finished rounds, as if
    fewer images of each class had been requested. Without a finished round, nothing is written.

    Args:
        config: the options of the landscape.
        world: the process group.
        until: deadline for the written result, in this machine's `time.monotonic()`.

    """
    found, per_class = load_model_and_subset(config)
    start = time.monotonic()
    process = JudgingProcess(config, found, world)
    order = found.images.balanced_positions(per_class)
    parts = distributed.gather((_judge_share(config, found.side, process, order, until), process.failures))
    if world.rank == 0:
        judged = {image.index: image for part, _ in parts for image in part}
        rounds = found.images.balanced_rounds(judged)
        if len(judged) < sum(len(part) for part, _ in parts) or (until is None and rounds < per_class):
            raise RuntimeError(
                f"{len(judged)} images were judged, or one of them twice; expected {per_class} of each class"
            )
        if rounds:
            kept = np.sort(found.images.balanced_positions(rounds))
            samples = _samples(process, kept)
            failures = [*process.failures, *(what for _, part in parts[1:] for what in part)]  # with the samples'
            write(
                config,
                found.images.balanced_subset(rounds),
                found.side,
                [judged[position] for position in kept.tolist()],
                samples,
                seconds=time.monotonic() - start,
                gpus=world.world_size if world.device.type == "cuda" else 0,
                decoding_failures=failures,
            )
        else:
            say("skipped the landscape: out of time")
    distributed.barrier()


def _judge_share(
    config: LandscapeConfig, side: int, process: JudgingProcess, order: NDArray[np.int64], until: float | None
) -> list[ImageLandscape]:
    """All views of this process's share of the images, as far as time allows."""
    size = max(1, PASSES_PER_BATCH * process.passes.size // GRID_VIEWS)
    found: list[ImageLandscape] = []
    with process.working() as moved:
        batches = process.batches("landscape", size, order=order)
        in_time = Deadline(until).guard(batches)
        with suppress(TimeUp):
            for image in judge_all_views(process.passes, in_time, config.limits, side, moved=moved):
                found.append(image)
    return found


def _samples(process: JudgingProcess, positions: NDArray[np.int64]) -> list[tuple[int, NDArray[np.uint8]]]:
    """Some of the images: places in `positions`, and pixels, uint8 [S, S, 3]."""
    sampled = sample_positions(len(positions))
    (batch,) = process.batches("pictures", len(sampled), order=positions[sampled], alone=True)
    return list(zip(sampled, batch.views[:, 0].cpu().numpy()))


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
    (out / LANDSCAPE_PICTURES).mkdir(parents=True, exist_ok=True)
    loss = np.stack([image.loss for image in found])
    correct = np.stack([image.correct for image in found])
    bits = np.packbits(correct, axis=1)
    write_atomically(out / LANDSCAPE_ARRAYS, lambda file: np.savez_compressed(file, loss=loss, correct=bits))
    paths = [images.relative_path(index) for index in range(len(found))]
    classes = [Path(path).parts[1] for path in paths]  # a class may have subfolders
    outputs = dict(zip(images.labels.tolist(), classes))
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
        "samples": [
            _write_sample(out, index, pixels, found[index], grid(limits)[found[index].worst_view], outputs)
            for index, pixels in samples
        ],
    }
    write_json(out / LANDSCAPE, content)
    say(
        f"all {GRID_VIEWS} views of {len(found)} images: {content['natural_top1_pct']:.1f} % right untouched, "
        f"{100 * float(correct.mean()):.1f} % of all views, {content['grid_top1_pct']:.1f} % right on every view; "
        f"written to {out / LANDSCAPE}"
    )


def _write_sample(
    out: Path,
    index: int,
    pixels: NDArray[np.uint8],
    image: ImageLandscape,
    worst: NDArray[np.float64],
    outputs: Mapping[int, str],
) -> dict[str, Any]:
    """Write an image and its worst view, with these degrees and translation; returns their description."""
    matrix_23 = matrices(worst, len(pixels))
    warped = warp(torch.from_numpy(pixels)[None], torch.from_numpy(matrix_23)[None, None])[0, 0]
    names = [f"{LANDSCAPE_PICTURES}/{index:05d}_{kind}.jpg" for kind in ("untouched", "worst")]
    for name, shown in zip(names, (torch.from_numpy(pixels), warped)):
        _write_jpeg(out / name, shown)
    degrees, tx, ty = worst * (1, NOMINAL_SIDE, NOMINAL_SIDE)
    return {
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


def _write_jpeg(path: Path, pixels: Tensor) -> None:
    from PIL import Image

    picture = Image.fromarray(pixels.numpy())
    write_atomically(path, lambda file: picture.save(file, "JPEG", quality=_JPEG_QUALITY, subsampling=0))
