"""The DALI graph from paths to views or crops: one definition for CPU, GPU, training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def

from fast_spatial.kernels.layout import Geometry
from fast_spatial.pipelines import ops
from fast_spatial.pipelines.ops import decode_box
from fast_spatial.pipelines.placement import Decoding, Placement


@pipeline_def
def view_graph(
    source: Callable[[Any], Any], *, views: int, center: bool, placement: Placement, on_gpu: bool
) -> tuple[ops.Node, ...]:
    """(views uint8 [V, S, S, 3], header int64) of each image of a batch; all but the header are on the device.

    With `placement.warp` "triton", the graph returns the inputs of the warp instead of the views: crop uint8 [S, S, 3],
    matrices float32 [V, 2, 3] and colour numbers float32 [len(Colour)].

    `source` yields (paths, headers, limits, settings), each as one contiguous array per batch. Where our own kernel
    resizes, it also yields a canvas (see `ops.numba_views`).
    """
    on_host = placement.resizes_on_host
    fed = fn.external_source(source, num_outputs=5 if on_host else 4, batch=True, batch_info=True)
    paths, header, limits, settings = fed[:4]
    encoded = fn.io.file.read(paths, dont_use_mmap=True)
    geometry, colour, matrices = ops.draw(
        header, fn.peek_image_shape(encoded, adjust_orientation=False), limits, settings
    )
    start = geometry[Geometry.BOX_Y : Geometry.BOX_X + 1]
    shape = geometry[Geometry.BOX_H : Geometry.BOX_W + 1]
    images = decode_box(encoded, start, shape, placement.decoding)

    def delivered(node: ops.Node) -> ops.Node:
        return node.gpu() if on_gpu else node

    if placement.warp == "numba":
        return delivered(ops.numba_views(fed[4], images, geometry, matrices, colour)), header
    if on_host:
        images = delivered(ops.numba_resize(fed[4], images, geometry))
    else:
        images = ops.dali_resize(delivered(images), geometry, center=center)
    if placement.warp == "triton":
        return images, delivered(matrices), delivered(colour), header
    return ops.dali_views(images, matrices, colour, views), header


@pipeline_def
def _first_pixel_graph(path: NDArray[np.uint8], decoding: Decoding) -> ops.Node:
    encoded = fn.io.file.read(fn.external_source(lambda: path[None], batch=True), dont_use_mmap=True)
    return decode_box(encoded, [0, 0], [1, 1], decoding)


def has_first_pixel(path: NDArray[np.uint8], decoding: Decoding, *, device_id: int | None) -> bool:
    """Whether the first pixel of a file can be decoded; if not, no part of it can.

    `path` is uint8 [W], padded with NUL.
    """
    graph = _first_pixel_graph(path, decoding, batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    try:
        graph.run()
    except RuntimeError:
        return False
    return True
