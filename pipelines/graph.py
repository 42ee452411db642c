"""The DALI graph, from paths to views: one definition for CPU and GPU, for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def

from kernels.sampling import BOX_H, BOX_Y
from pipelines import ops
from pipelines.decoding import decoder_options


@pipeline_def
def view_graph(
    source: Callable[[Any], Any],
    *,
    views: int,
    center: bool,
    on_gpu: bool,
    hw_decoder_load: float,
    warp_backend: str,
) -> tuple[ops.Node, ops.Node]:
    """(views uint8 [V, S, S, 3], header int64) of each image of a batch.

    `source` yields (paths, headers, limits, settings) and, for "numba", a canvas (`ops.numba_views`), each one
    contiguous array per batch. `warp_backend` is "numba" (host memory only) or "dali".
    """
    numba = warp_backend == "numba"
    fed = fn.external_source(source, num_outputs=5 if numba else 4, batch=True, batch_info=True)
    paths, header, limits, settings = fed[:4]
    encoded = fn.io.file.read(paths, dont_use_mmap=True)
    geometry, colour, matrices = ops.draw(
        header, fn.peek_image_shape(encoded, adjust_orientation=False), limits, settings
    )
    images = fn.decoders.image_slice(
        encoded,
        start=geometry[BOX_Y : BOX_Y + 2],
        shape=geometry[BOX_H : BOX_H + 2],
        axes=(0, 1),
        **decoder_options(on_gpu=on_gpu, hw_decoder_load=hw_decoder_load),
    )
    if numba:
        return ops.numba_views(fed[4], images, geometry, matrices, colour), header
    images = ops.dali_resize(images, geometry, center=center)
    return ops.dali_views(images, matrices, colour, views), header


@pipeline_def
def _first_pixel_graph(path: NDArray[np.uint8], on_gpu: bool) -> ops.Node:
    encoded = fn.io.file.read(fn.external_source(lambda: path[None], batch=True), dont_use_mmap=True)
    options = decoder_options(on_gpu=on_gpu, hw_decoder_load=0.0)
    return fn.decoders.image_slice(encoded, start=[0, 0], shape=[1, 1], axes=(0, 1), **options)


def has_first_pixel(path: NDArray[np.uint8], *, device_id: int | None) -> bool:
    """Whether the first pixel of a file, uint8 [W] padded with NUL, can be decoded; if not, no part of it can."""
    graph = _first_pixel_graph(
        path, device_id is not None, batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1
    )
    try:
        graph.run()
    except RuntimeError:
        return False
    return True
