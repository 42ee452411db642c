"""The warp alone: views of one image, or of a batch, in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.baselines.original import coordinates_by_affine_grid, coordinates_by_matmul, transform
from benchmarks.groups.rounds import Contender, compare
from benchmarks.jobs import Findings, Job
from benchmarks.jpegs import photograph
from fast_spatial.kernels.spatial import matrices
from fast_spatial.kernels.warp import warp
from fast_spatial.kernels.warp_cpu import warp_image

VIEWS, BATCH = 10, 16


def run(job: Job) -> Findings:
    """Compare with OpenCV on one thread, and with torch and DALI on all threads."""
    found = Findings.none()
    side = job.config.image_size
    pictures = [Image.fromarray(photograph(seed)).resize((side, side)) for seed in range(BATCH)]
    images = np.stack([np.asarray(picture) for picture in pictures])
    limits = job.limits
    params = np.random.default_rng(0).uniform(-1, 1, (BATCH, VIEWS, 3))
    params *= (limits.degrees, limits.translate, limits.translate)
    rows = matrices(params, side)
    found.attempt("warp.opencv", lambda found: _against_opencv(job, images[0], rows[0], found))
    found.attempt("warp.grid_sample", lambda found: _against_torch(job, images, params, rows, found))
    found.attempt("warp.dali_cpu", lambda found: _against_dali(job, images, rows, found))
    return found


def _against_opencv(job: Job, image: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], found: Findings) -> None:
    try:
        import cv2
    except ImportError:
        found.skipped["warp.opencv"] = "OpenCV is not installed. Run pip install opencv-python-headless"
        return
    side = job.config.image_size
    views = np.empty((VIEWS, side, side, 3), np.uint8)
    scratch = np.empty((side + 2, side + 2), np.int32)
    plain = np.eye(3, 4, dtype=np.float32)
    cv2.setNumThreads(1)

    def ours() -> int:
        warp_image(views, scratch, image, rows, plain)
        return VIEWS

    def opencv(hint: int) -> Callable[[], int]:
        def work() -> int:
            for view, row in zip(views, rows):
                cv2.warpAffine(
                    image,
                    row,
                    (side, side),
                    dst=view,
                    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                    borderMode=cv2.BORDER_CONSTANT,
                    hint=hint,
                )
            return VIEWS

        return work

    settings = [
        Contender("cv2.warpAffine, accurate", opencv(cv2.ALGO_HINT_ACCURATE)),
        Contender("cv2.warpAffine, approximate", opencv(cv2.ALGO_HINT_APPROX)),
    ]
    mine = Contender(f"numba, 1 thread, {VIEWS} views of an image, packing included", ours)
    found.comparisons.append(compare("warp.opencv", "views/s", mine, settings, **job.timing))


def _ours(job: Job, images: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> Contender:
    tensors = torch.from_numpy(images), torch.from_numpy(rows)

    def work() -> int:
        warp(*tensors)
        return BATCH * VIEWS

    return Contender(f"numba, {job.threads} threads", work)


def _against_torch(
    job: Job, images: np.ndarray[Any, Any], params: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], found: Findings
) -> None:
    floats = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).div(255).contiguous()
    angles, shifts = torch.from_numpy(params[..., 0]).float(), torch.from_numpy(params[..., 1:]).float()

    def torch_way(coordinates: Any) -> Callable[[], int]:
        def work() -> int:
            for view in range(VIEWS):
                transform(floats, angles[:, view], shifts[:, view], coordinates)
            return BATCH * VIEWS

        return work

    settings = [
        Contender("affine_grid and grid_sample, float32", torch_way(coordinates_by_affine_grid)),
        Contender("a matrix product per pixel and grid_sample, float32", torch_way(coordinates_by_matmul)),
    ]
    found.comparisons.append(compare("warp.grid_sample", "views/s", _ours(job, images, rows), settings, **job.timing))


def _against_dali(job: Job, images: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], found: Findings) -> None:
    from nvidia.dali import fn, pipeline_def, types

    def pipeline(as_frames: bool) -> Contender:
        @pipeline_def
        def graph() -> Any:
            batch = fn.external_source(lambda: images, batch=True, layout="HWC")
            matrices_V23 = fn.external_source(lambda: rows, batch=True)
            if as_frames:
                frames = fn.expand_dims(batch, axes=[0], new_axis_names="F")
                frames = fn.sequence_rearrange(frames, new_order=[0] * VIEWS)
                return fn.warp_affine(frames, matrix=fn.per_frame(matrices_V23), inverse_map=True, fill_value=0)
            views = [
                fn.warp_affine(batch, matrix=matrices_V23[view], inverse_map=True, fill_value=0, dtype=types.UINT8)
                for view in range(VIEWS)
            ]
            return tuple(views)

        built = graph(batch_size=BATCH, num_threads=job.threads, device_id=None, prefetch_queue_depth=1)

        def work() -> int:
            built.run()
            return BATCH * VIEWS

        how = "one operator over a sequence" if as_frames else "an operator per view"
        return Contender(f"DALI warp_affine, {job.threads} threads, {how}", work)

    found.comparisons.append(
        compare("warp.dali_cpu", "views/s", _ours(job, images, rows), [pipeline(True), pipeline(False)], **job.timing)
    )
