"""Scoring all views of a batch at once, compared with one forward pass per view; fidelity at a smaller size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.baselines.original import Original, coordinates_by_affine_grid, coordinates_by_matmul
from benchmarks.groups.rounds import Contender, compare, rates_of, spread
from benchmarks.jobs import Findings, Job
from benchmarks.trained import trained
from fast_spatial.evaluation.attack import losses_of, worst_view
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward, default_pass_size
from fast_spatial.kernels.sampling import EVALUATION, Views, draw_matrices, pack_key
from fast_spatial.kernels.warp import warp
from fast_spatial.models import classifier
from fast_spatial.models.classifier import Classifier
from fast_spatial.runtime.device import dtype_of

TRIES = 10
FIDELITY_IMAGES = 256


def views_of(job: Job, images: torch.Tensor) -> torch.Tensor:
    """The identity view and random warps of each image: uint8 [B, 11, S, S, 3]."""
    views = Views(TRIES, job.limits)
    drawn = draw_matrices(pack_key(EVALUATION, 0), 0, np.arange(len(images)), views, images.shape[1])
    return warp(images, torch.from_numpy(drawn).to(images.device))


def original_ways(job: Job, model: Classifier) -> list[tuple[str, Original]]:
    """The original code's attack on a copy of the model, in two settings."""
    ways = {"affine_grid": coordinates_by_affine_grid, "a matrix product per pixel": coordinates_by_matmul}
    return [
        (f"{TRIES + 1} passes in float32, NCHW, {name}", Original(model, limits=job.limits, coordinates=coordinates))
        for name, coordinates in ways.items()
    ]


def random_batch(job: Job) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(images uint8 [B, S, S, 3], the same images as float [B, 3, S, S], labels [B])."""
    side = job.config.image_size
    count = 256 if job.device.type == "cuda" else 32
    torch.manual_seed(0)
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8).to(job.device)
    labels = torch.randint(0, 1000, (count,)).to(job.device)
    return images, (images.permute(0, 3, 1, 2).to(torch.float32) / 255).contiguous(), labels


def run(job: Job) -> Findings:
    """Compare scoring a batch, warps included; measure the fidelity at a smaller image size."""
    found = Findings.none()
    images, floats, labels = random_batch(job)
    dtype = dtype_of("auto", job.device)
    model = Classifier(classifier.build("resnet18", 1000)).to(job.device)
    scorer = FoldedJudge(model, dtype)
    passes = BatchedForward(scorer, default_pass_size(job.device, job.config.image_size))

    def ours() -> int:
        worst_view(losses_of(passes(views_of(job, images)), labels))
        return len(labels)

    def theirs(way: Original) -> Any:
        def work() -> int:
            way.net.eval()
            way.worst_of(floats, labels, TRIES)
            return len(labels)

        return work

    settings = [Contender(name, theirs(way)) for name, way in original_ways(job, model)]
    name = f"all {TRIES + 1} views at once, {str(dtype).removeprefix('torch.')}, BatchNorm folded"
    found.comparisons.append(compare("score.11views", "images/s", Contender(name, ours), settings, **job.timing))
    views = views_of(job, images)

    def alone() -> int:
        passes(views)
        return len(labels)

    (rates,) = rates_of([Contender("score", alone)], **job.timing)
    found.stages["score"] = spread(rates)["median"]
    print("  score_side", flush=True)
    try:
        found.facts["score_side"] = fidelity(job)
    except ModuleNotFoundError as error:
        found.skipped["score_side"] = f"needs {error.name}, which is not installed"
    return found


def fidelity(job: Job) -> dict[str, Any]:
    """Share of images for which scoring at half size selects the same view, and share of the highest loss."""
    model, images, labels = trained(job, FIDELITY_IMAGES)
    side = images.shape[1]
    scorer = FoldedJudge(model, dtype_of("auto", job.device))
    same, picked, highest = 0, 0.0, 0.0
    for part in torch.split(torch.arange(len(images), device=images.device), 32):
        views = views_of(job, images[part])
        size = default_pass_size(job.device, side)
        losses = losses_of(BatchedForward(scorer, size)(views), labels[part])
        full = worst_view(losses)
        small = worst_view(losses_of(BatchedForward(scorer, size, side=side // 2)(views), labels[part]))
        same += int((full == small).sum())
        picked += losses.gather(1, small[:, None]).sum().item()
        highest += losses.gather(1, full[:, None]).sum().item()
    return {
        "model": Path(job.config.checkpoint).name or "digits",
        "images": len(images),
        "side": side,
        "score_side": side // 2,
        "same_view_pct": round(100 * same / len(images), 1),
        "loss_found_pct": round(100 * picked / highest, 1),
    }
