"""A whole worst-of-10 training step (warps, selection, training), compared with the original code."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.baselines.original import Original
from benchmarks.groups.rounds import Contender, compare, rates_of, spread
from benchmarks.groups.score import TRIES, original_ways, random_batch, views_of
from benchmarks.jobs import Findings, Job
from fast_spatial.models import classifier
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime.device import dtype_of
from fast_spatial.training.step import TrainStep


def make_step(job: Job, *, scored: bool, score_size: int = 0, compiled: bool | None = None) -> TrainStep:
    """A training step, built as in `launch.py train`."""
    model = Classifier(classifier.build("resnet18", 1000)).to(job.device)
    return TrainStep(
        model,
        torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True),
        dtype=dtype_of("auto", job.device),
        scored=scored,
        score_size=score_size,
        compiled=job.device.type == "cuda" if compiled is None else compiled,
    )


def run(job: Job) -> Findings:
    """Compare steps that score at the full and at half the image size; time training on one view."""
    found = Findings.none()
    images, floats, labels = random_batch(job)
    index = torch.arange(len(labels))
    half = job.config.image_size // 2
    dtype = str(dtype_of("auto", job.device)).removeprefix("torch.")

    def mine(step: TrainStep, views: Callable[[], torch.Tensor]) -> Callable[[], int]:
        def work() -> int:
            step(Batch(views(), labels, index))
            return len(labels)

        return work

    def theirs(way: Original) -> Callable[[], int]:
        def work() -> int:
            way.step(floats, labels, TRIES)
            return len(labels)

        return work

    for name, side in (("step.worst10", 0), (f"step.worst10_score{half}", half)):
        step = make_step(job, scored=True, score_size=side)
        about = f"warps and a step, {dtype}" + (f", judged at {side} px" if side else "")
        settings = [Contender(f"{about}, and a step", theirs(way)) for about, way in original_ways(job, step.model)]
        contender = Contender(about, mine(step, lambda: views_of(job, images)))
        found.comparisons.append(compare(name, "images/s", contender, settings, **job.timing))
    single = mine(make_step(job, scored=False), lambda: images[:, None])
    (rates,) = rates_of([Contender("forward and backward", single)], **job.timing)
    found.stages["forward and backward"] = spread(rates)["median"]
    return found
