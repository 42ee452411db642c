"""The exhaustive attack of 775 views on a trained model, against the original's, one image at a time."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from benchmarks.jobs import Findings, Job
from benchmarks.original import Original, coordinates_by_affine_grid, coordinates_by_matmul
from benchmarks.rounds import spread
from benchmarks.trained import trained
from fast_spatial.attack import GridSurvivors
from fast_spatial.evaluate import default_judge_batch
from fast_spatial.model import Classifier
from fast_spatial.scoring import Passes, Scorer


class Ours:
    """The natural view first, then the pool of survivors, which keeps what it learns from round to round."""

    def __init__(self, job: Job, model: Classifier, side: int) -> None:
        self._passes = Passes(Scorer(model, torch.float32), default_judge_batch(job.device, side), pad=True)
        self.pool = GridSurvivors(self._passes, job.limits, side)

    def survive(self, images: Tensor, labels: Tensor) -> list[bool]:
        """Which images are classified correctly on every view."""
        natural = self._passes(images[:, None]).argmax(dim=2)[:, 0] == labels
        rows = natural.nonzero()[:, 0].tolist()
        self.pool.add(images[rows], labels[rows].tolist(), rows)
        while self.pool.pending:
            self.pool.turn()
        survived = dict(self.pool.take_verdicts())
        return [survived.get(row, False) for row in range(len(images))]


def run(job: Job) -> Findings:
    """Judge the same images in both ways, a few of them a round, in float32."""
    found = Findings.none()
    per_round = job.config.grid_images
    model, images, labels = trained(job, per_round * job.config.rounds)
    floats = (images.permute(0, 3, 1, 2).to(torch.float32) / 255).contiguous()
    parts = torch.split(torch.arange(len(images)), per_round)
    mine = Ours(job, model, images.shape[1])
    ways = {
        name: Original(model, limits=job.limits, coordinates=coordinates)
        for name, coordinates in (("affine_grid", coordinates_by_affine_grid), ("matmul", coordinates_by_matmul))
    }
    name = min(ways, key=lambda way: _seconds(lambda: ways[way].survives_grid(floats[0], int(labels[0]))))
    rates: tuple[list[float], list[float]] = ([], [])
    answers: tuple[list[bool], list[bool]] = ([], [])
    mine.survive(images[:1], labels[:1])  # compiled and warm
    for part in parts:
        rows = part.to(images.device)
        start = time.perf_counter()
        answers[0].extend(mine.survive(images[rows], labels[rows]))
        middle = time.perf_counter()
        answers[1].extend(ways[name].survives_grid(floats[row], int(labels[row])) for row in part.tolist())
        rates[0].append(len(part) / (middle - start))
        rates[1].append(len(part) / (time.perf_counter() - middle))
    ratios = [a / b for a, b in zip(*rates)]
    same = sum(a == b for a, b in zip(*answers))
    found.comparisons.append(
        {
            "name": "grid",
            "unit": "images/s",
            "rounds": len(parts),
            "ours": {"what": "pooled survivors, float32", **spread(rates[0])},
            "baseline": {"what": f"one image at a time, float32, {name}", **spread(rates[1])},
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "same_answer": f"{same} of {len(images)} images",
        }
    )
    found.facts["grid"] = {
        "model": job.config.checkpoint or "digits",
        "images": len(images),
        "survivors": sum(answers[0]),
        "different_answers": [index for index, (a, b) in enumerate(zip(*answers)) if a != b],
    }
    return found


def _seconds(work: object) -> float:
    assert callable(work)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
