"""From JPEG files to views in memory, compared with torchvision's DataLoader and FFCV; rate of each stage alone."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from benchmarks.baselines import original
from benchmarks.groups.rounds import Contender, compare, rates_of, spread
from benchmarks.jobs import Findings, Job
from fast_spatial.config.modes import MODES
from fast_spatial.data.placing import choose_placement
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.pipelines.dataset import ImageIndex, read_index
from fast_spatial.pipelines.loader import Loader
from fast_spatial.pipelines.placement import Placement
from fast_spatial.pipelines.sampler import BatchSampler

# Limited, because a batch of 11 views takes 0.4 GB of the workers' shared memory.
TORCHVISION_BATCH = 64
# Batches that DALI may have prefetched; they are not timed.
READY = 6
SETTLE_SEC = 0.5  # lets threads and workers of the previous contender become idle
ROOT = Path(__file__).resolve().parents[2]


def run(job: Job) -> Findings:
    """Compare modes with the original code's loader, and standard with FFCV; time the stages."""
    found = Findings.none()
    index = read_index(job.images, "train")
    for mode, warps in (("standard", 0), ("random", 1), ("worst10", 10)):
        baselines = [_torchvision(job, warps, job.threads, in_workers=True)]
        if warps:
            baselines.append(_torchvision(job, warps, job.threads, in_workers=False))
        if job.config.read_latency_ms:  # more workers hide the latency of a slow disk
            baselines.append(_torchvision(job, warps, 4 * job.threads, in_workers=True))
        ours = _ours(job, index, mode)
        found.comparisons.append(compare(f"pipeline.{mode}", "images/s", ours, baselines, **job.timing))
        found.stages[f"loader: {mode}"] = found.comparisons[-1]["ours"]["median"]
    _against_ffcv(job, index, found)
    print("  decode and read", flush=True)
    decode, read = rates_of([_decoding(job, index), _reading(job, index)], **job.timing)
    found.stages["decode"] = spread(decode)["median"]
    found.stages["read"] = spread(read)["median"]
    if job.device.type == "cuda":
        (without,) = rates_of([_decoding(job, index, 0.0)], **job.timing)
        found.facts["decode_images_per_sec"] = {
            "threads": job.threads,
            "with_hardware_decoder": spread(decode),
            "without": spread(without),
        }
    return found


def _steady(name: str, batches: Generator[Any, None, None], *, images: int, ready: int) -> Contender:
    """A contender that consumes batches of `images` images, and closes the generator at the end.

    Before each round, it drops the up to `ready` batches that were prefetched.
    """

    def begin() -> None:
        time.sleep(SETTLE_SEC)
        for _ in range(ready):
            next(batches)

    def work() -> int:
        next(batches)
        return images

    return Contender(name, work, begin, batches.close)


def _batch(job: Job) -> int:
    """Images per batch: a GPU's decoder is fast only on large batches."""
    return 256 if job.device.type == "cuda" else 32


def make_loader(
    index: ImageIndex,
    mode: str,
    *,
    limits: SpatialLimits,
    side: int,
    batch: int,
    threads: int,
    device: torch.device,
    placement: Placement,
) -> Loader:
    """A loader with the settings of training in a mode."""
    warps = MODES[mode].warps
    return Loader(
        BatchSampler(index, global_batch_size=batch, seed=0, train=True),
        augmentation=Augmentation(center=False, flip_prob=0.5, jitter=(0.1, 0.1, 0.1), lighting_std=0.05),
        views=Views(10 if warps is None else warps, limits, untouched_first=MODES[mode].untouched),
        side=side,
        threads=threads,
        device=device,
        placement=placement,
    )


def _ours(job: Job, index: ImageIndex, mode: str) -> Contender:
    loader = make_loader(
        index,
        mode,
        limits=job.limits,
        side=job.config.image_size,
        batch=_batch(job),
        threads=job.threads,
        device=job.device,
        placement=choose_placement("auto", "auto", on_gpu=job.device.type == "cuda", exact=False),
    )
    batches = (batch for epoch in itertools.count() for batch in loader.epoch(epoch))
    return _steady(f"fast_spatial {mode}, {job.threads} threads", batches, images=_batch(job), ready=READY)


def _torchvision(job: Job, warps: int, workers: int, *, in_workers: bool) -> Contender:
    images = min(_batch(job), TORCHVISION_BATCH)
    batches = original.loader(
        job.images,
        side=job.config.image_size,
        batch=images,
        workers=workers,
        warps=warps,
        limits=job.limits,
        in_workers=in_workers,
    )
    where = "" if not warps else f", grid_sample in the {'workers' if in_workers else 'main process'}"
    ready = original.PREFETCH * workers + 2
    return _steady(f"torchvision and PIL, {workers} workers{where}", batches, images=images, ready=ready)


def _decoding(job: Job, index: ImageIndex, hw_decoder_load: float = 0.65) -> Contender:
    """DALI's decoder alone, on whole images; on a GPU, `hw_decoder_load` is the share of the JPEG engine."""
    paths, batch = itertools.cycle(index.paths), _batch(job)
    on_gpu = job.device.type == "cuda"
    decoder: Any = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if on_gpu else {"device": "cpu"}

    @pipeline_def
    def graph() -> Any:
        names = fn.external_source(lambda: np.stack(list(itertools.islice(paths, batch))), batch=True)
        encoded = fn.io.file.read(names, dont_use_mmap=True)
        return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False, **decoder)

    built = graph(batch_size=batch, num_threads=job.threads, device_id=0 if on_gpu else None, exec_dynamic=True)
    return _steady("decode", (built.run() for _ in itertools.count()), images=batch, ready=READY)


def _reading(job: Job, index: ImageIndex) -> Contender:
    """Reading files, with about as many concurrent reads as the loader."""
    paths = itertools.cycle(path.tobytes().rstrip(b"\0") for path in index.paths)
    pool = ThreadPoolExecutor(max(4, job.threads))

    def work() -> int:
        return sum(pool.map(_read, itertools.islice(paths, _batch(job))))

    return Contender("read", work, end=pool.shutdown)


def _read(path: bytes) -> int:
    with open(path, "rb") as file:
        file.read()
    return 1


class _Ffcv:
    """FFCV in a separate Python environment: a process that makes a batch on request."""

    def __init__(self, python: str, job: Job) -> None:
        words = [
            python,
            str(ROOT / "benchmarks" / "baselines" / "ffcv_jpg.py"),
            str(job.images),
            str(job.config.image_size),
        ]
        words += [str(_batch(job)), str(job.threads)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ready = 2 * job.threads + 2
        self.about = self.ask("about")

    def ask(self, word: str) -> dict[str, Any]:
        """Send a word, and return the answer, a line of JSON."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(word, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("FFCV's process ended; see its messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def work(self) -> int:
        """Consume a batch; returns its number of images."""
        return int(self.ask("batch")["images"])

    def begin(self) -> None:
        """Warm up to the steady state."""
        time.sleep(SETTLE_SEC)
        for _ in range(self._ready):
            self.ask("batch")

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def _against_ffcv(job: Job, index: ImageIndex, found: Findings) -> None:
    if job.config.read_latency_ms:
        found.skipped["pipeline.ffcv_jpg"] = "FFCV reads one large file, which --read-latency-ms does not affect"
        return
    if not job.config.ffcv_python:
        found.skipped["pipeline.ffcv_jpg"] = "FFCV not given: set --ffcv-python to a Python with FFCV"
        return
    try:
        ffcv = _Ffcv(job.config.ffcv_python, job)
    except (OSError, RuntimeError) as error:
        found.skipped["pipeline.ffcv_jpg"] = f"--ffcv-python {job.config.ffcv_python} failed: {error}"
        print(error, file=sys.stderr)
        return
    size = ffcv.about["bytes_per_image"] / 1000
    theirs = Contender(
        f"FFCV {ffcv.about['version']}, JPEG of {size:.0f} kB, crop and flip, {job.threads} threads",
        ffcv.work,
        ffcv.begin,
    )
    try:
        ours = _ours(job, index, "standard")
        found.comparisons.append(compare("pipeline.ffcv_jpg", "images/s", ours, [theirs], **job.timing))
    except RuntimeError as error:  # keep earlier measurements
        found.skipped["pipeline.ffcv_jpg"] = f"--ffcv-python {job.config.ffcv_python} failed: {error}"
    finally:
        ffcv.close()
