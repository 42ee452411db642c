"""What only a GPU can show: rates beside their ceilings, by side and batch size, on synthetic views in its memory.

The ceilings are measured too: a fill for written bytes, a large matrix product for arithmetic.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import processes
from benchmarks.jobs import Findings, Job
from benchmarks.step import make_step
from fast_spatial import model as models
from fast_spatial.device import dtype_of
from fast_spatial.model import Classifier
from fast_spatial.scoring import Passes, Scorer
from kernels.spatial import matrices
from kernels.warp import normalize, warp_normalized
from pipelines.loader import Batch

CANDIDATES = 11
SIDES = (224, 160)
SCORE_BATCHES = (256, 1024, 2816)
TRAIN_BATCHES = (256, 1024)
WORST10_BATCHES = (64, 256)


def run(job: Job) -> Findings:
    """Warp, scoring and training, with compiled networks and without; training by number of processes."""
    found = Findings.none()
    dtype, device = dtype_of("auto", job.device), job.device
    peak = _peak_flops(dtype, device)
    found.facts["ceilings"] = {"dtype": str(dtype), "matmul_tflops": round(peak / 1e12, 1)}
    found.facts |= _warp(job, dtype)
    kinds: dict[str, tuple[tuple[int, ...], Callable[..., dict[str, Any]]]] = {
        "score": (SCORE_BATCHES, partial(_score, device, dtype)),
        "train_standard": (TRAIN_BATCHES, partial(_train, job, 1)),
        "train_worst10": (WORST10_BATCHES, partial(_train, job, CANDIDATES)),
    }
    for side in SIDES:
        for kind, (batches, measure) in kinds.items():
            # A compilation takes half a minute: of the largest batch only.
            for batch, compiled in [*((batch, False) for batch in batches), (batches[-1], True)]:
                name = f"{kind}_{side}px_batch_{batch}" + ("_compiled" if compiled else "")
                print(f"  {name}", flush=True)
                found.facts[name] = _fits(measure, side, batch, peak, compiled)
    found.add(processes.run(job))
    return found


def _seconds(work: Callable[[], object], device: torch.device, rounds: int = 7, at_least: float = 0.05) -> float:
    """The median time of a call, in batches of calls that last a while."""

    def spent(calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        spent(1)
    calls = max(1, math.ceil(at_least / max(spent(1), 1e-7)))
    return statistics.median(spent(calls) / calls for _ in range(rounds))


def _fits(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A measurement with its peak memory, or the word that it did not fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        found = measure(*arguments)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    if torch.cuda.is_available():
        found["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def _peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device)


def _warp(job: Job, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes written per second by the fused warp and cast, beside a fill's of the same tensor."""
    device = job.device
    B, V, S = (64, 16, 224) if device.type == "cuda" else (2, 2, 32)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (B, S, S, 3), dtype=torch.uint8).to(device)
    params = np.random.default_rng(0).uniform(-1, 1, (B, V, 3)) * (30, 3 / 28, 3 / 28)
    rows = torch.from_numpy(matrices(params, S)).to(device)
    views = torch.randint(0, 256, (B * V, S, S, 3), dtype=torch.uint8).to(device)
    model = Classifier(torch.nn.Identity()).to(device)
    target = torch.empty(B * V, 3, S, S, dtype=dtype, device=device)
    fill = target.nbytes / _seconds(lambda: target.fill_(1.0), device)
    found = {}
    for name, work in {
        "warp_normalized": lambda: warp_normalized(images, rows, model.scale, model.shift, dtype),
        "normalize": lambda: normalize(views, model.scale, model.shift, dtype),
    }.items():
        spent = _seconds(work, device)
        found[name] = {
            "views_per_sec": round(B * V / spent),
            "written_gb_per_sec": round(target.nbytes / spent / 1e9, 1),
            "fill_gb_per_sec": round(fill / 1e9, 1),
            "share_of_fill_pct": round(100 * target.nbytes / spent / fill, 1),
        }
    return found


def _flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def _score(
    device: torch.device, dtype: torch.dtype, side: int, batch: int, peak: float, compiled: bool
) -> dict[str, Any]:
    model = Classifier(models.build("resnet18", 1000)).to(device)
    passes = Passes(Scorer(model, dtype, compiled=compiled), batch, pad=True)
    views = torch.randint(0, 256, (batch, 1, side, side, 3), dtype=torch.uint8, device=device)
    flops = _flops(lambda: Scorer(model, dtype)(views[:2, 0])) / 2 * batch
    spent = _seconds(lambda: passes(views), device)
    return {
        "views_per_pass": passes.size,
        "views_per_sec": round(batch / spent, 1),
        "flop_utilization_pct": round(100 * flops / spent / peak, 1),
    }


def _train(job: Job, views: int, side: int, batch: int, peak: float, compiled: bool) -> dict[str, Any]:
    step = make_step(job, scored=views > 1, compiled=compiled)
    candidates = torch.randint(0, 256, (batch, views, side, side, 3), dtype=torch.uint8, device=job.device)
    labels = torch.randint(0, 1000, (batch,), device=job.device)
    index = torch.arange(batch)
    few = Batch(candidates[:4], labels[:4], index[:4])
    plain = make_step(job, scored=views > 1, compiled=False)
    flops = _flops(lambda: plain(few)) / 4 * batch
    spent = _seconds(lambda: step(Batch(candidates, labels, index)), job.device)
    return {"images_per_sec": round(batch / spent, 1), "flop_utilization_pct": round(100 * flops / spent / peak, 1)}
