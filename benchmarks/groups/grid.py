"""The exhaustive attack of 775 views on a trained model, compared with the original code, image by image."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.baselines.original import Original, coordinates_by_affine_grid, coordinates_by_matmul
from benchmarks.groups.rounds import spread
from benchmarks.jobs import Findings, Job
from benchmarks.trained import trained
from fast_spatial.evaluation.attack import GridSurvivors
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward, default_judge_batch
from fast_spatial.models.classifier import Classifier
from fast_spatial.runtime.device import exact_float32, has_bfloat16


class Ours:
    """Our attack: the identity view first, then the pool of survivors, which keeps its statistics between rounds."""

    def __init__(self, job: Job, model: Classifier, side: int, dtype: torch.dtype) -> None:
        self._passes = BatchedForward(FoldedJudge(model, dtype), default_judge_batch(job.device, side), pad=True)
        self.pool = GridSurvivors(self._passes, job.limits, side)
        self.views: list[int] = []
        self.views_broken: list[int] = []

    def survive(self, images: Tensor, labels: Tensor) -> list[bool]:
        """Whether each image is classified correctly on every view."""
        natural = self._passes(images[:, None]).argmax(dim=2)[:, 0] == labels
        rows = natural.nonzero()[:, 0].tolist()
        self.pool.add(images[rows], labels[rows].tolist(), rows)
        self.pool.finish()
        verdicts = {verdict.index: verdict for verdict in self.pool.take_verdicts()}
        self.views += [verdicts[row].views_judged if row in verdicts else 1 for row in range(len(images))]
        self.views_broken += [verdict.views_judged for verdict in verdicts.values() if not verdict.survived]
        return [row in verdicts and verdicts[row].survived for row in range(len(images))]


def run(job: Job) -> Findings:
    """Attack the same images in both ways, a few per round: in float32, and in bfloat16 where it is fast."""
    with exact_float32(True):
        return _run(job)


def _run(job: Job) -> Findings:
    found = Findings.none()
    per_round = job.config.grid_images
    model, images, labels = trained(job, per_round * job.config.rounds)
    floats = (images.permute(0, 3, 1, 2).to(torch.float32) / 255).contiguous()
    dtypes = [torch.float32, *([torch.bfloat16] if has_bfloat16(job.device) else [])]
    mine = [Ours(job, model, images.shape[1], dtype) for dtype in dtypes]
    ways = {
        name: Original(model, limits=job.limits, coordinates=coordinates)
        for name, coordinates in (
            ("affine_grid", coordinates_by_affine_grid),
            ("a matrix product per pixel", coordinates_by_matmul),
        )
    }
    for way in ways.values():
        way.survives_grid(floats[0], int(labels[0]), rotations=1)
    name = min(ways, key=lambda way: _seconds(lambda: ways[way].survives_grid(floats[0], int(labels[0]))))
    for ours in mine:  # warm up; the pool keeps its statistics
        ours.survive(images[:1], labels[:1])
        ours.views.clear()
        ours.views_broken.clear()
    print(f"  grid, {job.config.rounds} rounds of {per_round} images", flush=True)
    rates: list[list[float]] = [[] for _ in [*mine, name]]
    answers: list[list[bool]] = [[] for _ in [*mine, name]]
    for rows in torch.split(torch.arange(len(images), device=images.device), per_round):
        works = [partial(ours.survive, images[rows], labels[rows]) for ours in mine]
        works.append(partial(_one_by_one, ways[name], floats[rows], labels[rows]))
        for which, work in enumerate(works):
            start = time.perf_counter()
            answers[which].extend(work())
            rates[which].append(len(rows) / (time.perf_counter() - start))
    for which, dtype in enumerate(dtypes):
        ratios = [a / b for a, b in zip(rates[which], rates[-1])]
        about = str(dtype).removeprefix("torch.")
        different = [n for n, (a, b) in enumerate(zip(answers[which], answers[-1])) if a != b]
        found.comparisons.append(
            {
                "name": "grid" if dtype == torch.float32 else f"grid.{about}",
                "unit": "images/s",
                "rounds": len(ratios),
                "ours": {"what": f"pooled survivors, {about}", **spread(rates[which])},
                "baseline": {"what": f"one image at a time, float32, {name}", **spread(rates[-1])},
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "same_answer": f"{len(images) - len(different)} of {len(images)} images",
            }
        )
    first = mine[0]
    found.facts["grid"] = {
        "model": Path(job.config.checkpoint).name or "digits",
        "images": len(images),
        "survivors": sum(answers[0]),
        "views_per_image": round(statistics.mean(first.views), 1) if first.views else None,
        "views_per_broken_image": round(statistics.mean(first.views_broken), 1) if first.views_broken else None,
    }
    return found


def _one_by_one(way: Original, images: Tensor, labels: Tensor) -> list[bool]:
    return [way.survives_grid(image, label) for image, label in zip(images, labels.tolist())]


def _seconds(work: object) -> float:
    assert callable(work)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
