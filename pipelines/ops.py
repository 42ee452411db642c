"""The two steps of the graph that are our own, as DALI operators: drawing an image's augmentation, making its views.

Compiling a numba operator takes seconds and is never cached on disk, so the heavy code lives in cached functions that
the operators only call, and each operator is compiled once per process, whatever the number of pipelines.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import njit
from nvidia.dali import fn, types
from nvidia.dali.plugin.numba import NumbaFunction

from kernels.colour import write_colour_matrix, write_mean_rgb
from kernels.sampling import COLOUR_WIDTH, GEOMETRY_WIDTH, draw_image
from kernels.warp_cpu import warp_image

Node = Any  # DALI's DataNode


# DALI shows a setup function as many inputs as the operator has outputs, so the inputs that set shapes come first.
def _draw_shapes(outs, ins):  # type: ignore[no-untyped-def]
    for sample in range(len(outs[0])):
        outs[0][sample][0] = GEOMETRY_WIDTH
        outs[1][sample][0] = COLOUR_WIDTH
        outs[2][sample][0] = ins[0][sample][0]
        outs[2][sample][1] = 2
        outs[2][sample][2] = 3


def _draw(geometry, colour, matrices, limits, header, shape, settings):  # type: ignore[no-untyped-def]
    draw_image(geometry, colour, matrices, header, shape, limits, settings)


@cache
def _draw_operator() -> Any:
    return NumbaFunction(
        run_fn=_draw,
        setup_fn=_draw_shapes,
        out_types=[types.INT32, types.FLOAT, types.FLOAT],
        outs_ndim=[1, 1, 3],
        in_types=[types.FLOAT64, types.INT64, types.INT64, types.FLOAT64],
        ins_ndim=[2, 1, 1, 1],
    )


def draw(header: Node, shape: Node, limits: Node, settings: Node) -> tuple[Node, Node, Node]:
    """(geometry, colour numbers, matrices) of each image; see `kernels.sampling.draw_image`."""
    geometry, colour, matrices = _draw_operator()(limits, header, shape, settings)
    return geometry, colour, matrices


@njit(cache=True, nogil=True)
def _views_of(views, scratch, image, matrices, colour):  # type: ignore[no-untyped-def]
    mean = np.empty(3, np.float32)
    matrix = np.empty((3, 4), np.float32)
    write_mean_rgb(mean, image)
    write_colour_matrix(matrix, colour, mean)
    warp_image(views, scratch, image, matrices, matrix)


def _views_shapes(outs, ins):  # type: ignore[no-untyped-def]
    for sample in range(len(outs[0])):
        side = ins[0][sample][0]
        outs[0][sample][0] = ins[1][sample][0]
        outs[0][sample][1] = side
        outs[0][sample][2] = side
        outs[0][sample][3] = 3
        outs[1][sample][0] = side + 2
        outs[1][sample][1] = side + 2


def _views(views, scratch, image, matrices, colour):  # type: ignore[no-untyped-def]
    _views_of(views, scratch, image, matrices, colour)


@cache
def _views_operator() -> Any:
    return NumbaFunction(
        run_fn=_views,
        setup_fn=_views_shapes,
        out_types=[types.UINT8, types.UINT64],
        outs_ndim=[4, 2],
        in_types=[types.UINT8, types.FLOAT, types.FLOAT],
        ins_ndim=[3, 3, 1],
    )


def _colour_shapes(outs, ins):  # type: ignore[no-untyped-def]
    for sample in range(len(outs[0])):
        outs[0][sample][0] = 3
        outs[0][sample][1] = 4


def _colour(matrix, numbers, mean):  # type: ignore[no-untyped-def]
    write_colour_matrix(matrix, numbers, mean)


@cache
def _colour_operator() -> Any:
    return NumbaFunction(
        run_fn=_colour,
        setup_fn=_colour_shapes,
        out_types=[types.FLOAT],
        outs_ndim=[2],
        in_types=[types.FLOAT, types.FLOAT],
        ins_ndim=[1, 1],
    )


def numba_views(images: Node, matrices: Node, colour: Node) -> Node:
    """uint8 [V, S, S, 3] views of uint8 [S, S, 3] images in host memory: colours changed once, then V warps."""
    views, _scratch = _views_operator()(images, matrices, colour)
    return views


def dali_views(images: Node, matrices: Node, colour: Node, views: int) -> Node:
    """The same from DALI's own operators, in host or GPU memory."""
    # DALI's border is the pixels' corner, ours their centre: the same matrix, with shifted offsets.
    mean = fn.reductions.mean(images, axes=(0, 1)).cpu()
    images = fn.coord_transform(images, MT=_colour_operator()(colour, mean), dtype=types.UINT8)
    frames = fn.sequence_rearrange(fn.expand_dims(images, axes=[0], new_axis_names="F"), new_order=[0] * views)
    linear = matrices[:, :, 0:2]
    offset = matrices[:, :, 2:3] + 0.5 - 0.5 * fn.reductions.sum(linear, axes=[2], keep_dims=True)
    corner_matrices = fn.cat(linear, offset, axis=2)
    return fn.warp_affine(frames, matrix=fn.per_frame(corner_matrices), inverse_map=True, fill_value=0)
