"""The steps of the graph that are our own, as DALI operators: drawing an image's augmentation, making its views.

DALI's own `numba_function` compiles a dozen helpers with every pipeline and caches none: seconds per process. In the
end it only hands C functions to its operator, so here those are `numba.cfunc`s with an on-disk cache. They follow the C
interface of DALI's `NumbaFuncImpl` (as `nvidia.dali.plugin.numba` calls it): arrays of pointers to data and shapes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit
from numba import types as numba_types
from nvidia.dali import fn, types
from nvidia.dali.plugin.numba import NumbaFunction, address_as_void_pointer  # type: ignore[attr-defined]

from fast_spatial.kernels.colour import write_colour_matrix, write_colour_parts, write_mean_rgb
from fast_spatial.kernels.resize import resize_window
from fast_spatial.kernels.sampling import (
    COLOUR_WIDTH,
    CROP_H,
    CROP_X,
    CROP_Y,
    GEOMETRY_WIDTH,
    HEADER_WIDTH,
    RESIZED_H,
    RESIZED_W,
    SETTINGS_WIDTH,
    draw_image,
)
from fast_spatial.kernels.warp_cpu import warp_image
from fast_spatial.pipelines.placement import Decoding


def decoder_options(decoding: Decoding) -> dict[str, Any]:
    """How images are decoded, in training as in a check."""
    on_cpu = decoding.on == "cpu"
    device = {"device": "cpu"} if on_cpu else {"device": "mixed", "hw_decoder_load": decoding.hw_decoder_load}
    return {
        "output_type": types.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
        "use_fast_idct": False,
        **device,
    }


def decode_box(encoded: Any, start: Any, shape: Any, decoding: Decoding) -> Any:
    """A box of each encoded image, uint8 [H, W, 3] as a node of a graph, in the memory of what decodes it."""
    options = decoder_options(decoding)
    if decoding.on == "gpu-full":
        return fn.slice(fn.decoders.image(encoded, **options), start=start, shape=shape, axes=(0, 1))
    return fn.decoders.image_slice(encoded, start=start, shape=shape, axes=(0, 1), **options)


Node = Any  # DALI's DataNode

# (out data, out shapes, out ndims, outs, in data, in shapes, in ndims, ins) of one sample.
_RUN = numba_types.void(*(numba_types.uint64, numba_types.uint64, numba_types.uint64, numba_types.int32) * 2)
# (out shapes, out ndims, outs, in shapes, in ndims, ins, samples) of a batch.
_SETUP = numba_types.void(*(numba_types.uint64, numba_types.uint64, numba_types.int32) * 2, numba_types.int32)


@njit(cache=True)
def _data_pointer(pointers, position):  # type: ignore[no-untyped-def]
    """The address of one input's or output's data, in a run function."""
    return address_as_void_pointer(carray(address_as_void_pointer(pointers), position + 1, np.int64)[position])


@njit(cache=True)
def _shape_of(shapes, position, ndim):  # type: ignore[no-untyped-def]
    """One input's or output's shape, int64 [ndim], in a run function."""
    pointer = carray(address_as_void_pointer(shapes), position + 1, np.int64)[position]
    return carray(address_as_void_pointer(pointer), ndim, np.int64)


@njit(cache=True)
def _sample_shape(shapes, position, sample, samples, ndim):  # type: ignore[no-untyped-def]
    """One sample's shape, int64 [ndim], to read or to set, in a setup function."""
    return _shape_of(shapes, position * samples + sample, ndim)


class _CachedNumbaFunction(NumbaFunction):  # type: ignore[misc]
    """DALI's operator around compiled C functions: `run_fn` of signature _RUN, `setup_fn` of signature _SETUP."""

    def _get_run_fn_cpu(self, run_fn: Any, *_: Any) -> int:
        return int(run_fn.address)

    def _get_setup_fn_cpu(self, setup_fn: Any) -> int:
        return int(setup_fn.address)


@cfunc(_SETUP, cache=True)
def _draw_setup(out_shapes, _out_ndims, _outs, in_shapes, _in_ndims, _ins, samples):  # type: ignore[no-untyped-def]
    for sample in range(samples):
        _sample_shape(out_shapes, 0, sample, samples, 1)[0] = GEOMETRY_WIDTH
        _sample_shape(out_shapes, 1, sample, samples, 1)[0] = COLOUR_WIDTH
        matrices = _sample_shape(out_shapes, 2, sample, samples, 3)
        matrices[0] = _sample_shape(in_shapes, 0, sample, samples, 2)[0]
        matrices[1], matrices[2] = 2, 3


@cfunc(_RUN, cache=True)
def _draw_run(outs, _out_shapes, _out_ndims, _outs, ins, in_shapes, _in_ndims, _ins):  # type: ignore[no-untyped-def]
    views = _shape_of(in_shapes, 0, 2)[0]
    draw_image(
        carray(_data_pointer(outs, 0), GEOMETRY_WIDTH, np.int32),
        carray(_data_pointer(outs, 1), COLOUR_WIDTH, np.float32),
        carray(_data_pointer(outs, 2), (views, 2, 3), np.float32),
        carray(_data_pointer(ins, 1), HEADER_WIDTH, np.int64),
        carray(_data_pointer(ins, 2), 3, np.int64),
        carray(_data_pointer(ins, 0), (views, 2), np.float64),
        carray(_data_pointer(ins, 3), SETTINGS_WIDTH, np.float64),
    )


@cache
def _draw_operator() -> Any:
    return _CachedNumbaFunction(
        run_fn=_draw_run,
        setup_fn=_draw_setup,
        out_types=[types.INT32, types.FLOAT, types.FLOAT],
        outs_ndim=[1, 1, 3],
        in_types=[types.FLOAT64, types.INT64, types.INT64, types.FLOAT64],
        ins_ndim=[2, 1, 1, 1],
    )


def draw(header: Node, shape: Node, limits: Node, settings: Node) -> tuple[Node, Node, Node]:
    """(geometry, colour numbers, matrices) of each image; see `kernels.sampling.draw_image`."""
    geometry, colour, matrices = _draw_operator()(limits, header, shape, settings)
    return geometry, colour, matrices


@cfunc(_SETUP, cache=True)
def _views_setup(out_shapes, _out_ndims, _outs, in_shapes, _in_ndims, _ins, samples):  # type: ignore[no-untyped-def]
    for sample in range(samples):
        side = _sample_shape(in_shapes, 0, sample, samples, 1)[0]
        views = _sample_shape(out_shapes, 0, sample, samples, 4)
        views[0] = _sample_shape(in_shapes, 1, sample, samples, 3)[0]
        views[1], views[2], views[3] = side, side, 3
        words = _sample_shape(out_shapes, 1, sample, samples, 2)
        words[0], words[1] = side + 2, side + 2
        resized = _sample_shape(out_shapes, 2, sample, samples, 3)
        resized[0], resized[1], resized[2] = side, side, 3


@cfunc(_RUN, cache=True)
def _views_run(outs, _out_shapes, _out_ndims, _outs, ins, in_shapes, _in_ndims, _ins):  # type: ignore[no-untyped-def]
    side, views = _shape_of(in_shapes, 0, 1)[0], _shape_of(in_shapes, 1, 3)[0]
    shape = _shape_of(in_shapes, 2, 3)
    geometry = carray(_data_pointer(ins, 3), GEOMETRY_WIDTH, np.int32)
    resized = carray(_data_pointer(outs, 2), (side, side, 3), np.uint8)
    resize_window(
        resized,
        carray(_data_pointer(ins, 2), (shape[0], shape[1], 3), np.uint8),
        geometry[RESIZED_H],
        geometry[RESIZED_W],
        geometry[CROP_Y],
        geometry[CROP_X],
    )
    mean = np.empty(3, np.float32)
    matrix = np.empty((3, 4), np.float32)
    write_mean_rgb(mean, resized)
    write_colour_matrix(matrix, carray(_data_pointer(ins, 4), COLOUR_WIDTH, np.float32), mean)
    warp_image(
        carray(_data_pointer(outs, 0), (views, side, side, 3), np.uint8),
        carray(_data_pointer(outs, 1), (side + 2, side + 2), np.int32),
        resized,
        carray(_data_pointer(ins, 1), (views, 2, 3), np.float32),
        matrix,
    )


@cache
def _views_operator() -> Any:
    return _CachedNumbaFunction(
        run_fn=_views_run,
        setup_fn=_views_setup,
        out_types=[types.UINT8, types.INT32, types.UINT8],
        outs_ndim=[4, 2, 3],
        in_types=[types.UINT8, types.FLOAT, types.UINT8, types.INT32, types.FLOAT],
        ins_ndim=[1, 3, 3, 1, 1],
    )


@cfunc(_SETUP, cache=True)
def _resize_setup(out_shapes, _out_ndims, _outs, in_shapes, _in_ndims, _ins, samples):  # type: ignore[no-untyped-def]
    for sample in range(samples):
        side = _sample_shape(in_shapes, 0, sample, samples, 1)[0]
        resized = _sample_shape(out_shapes, 0, sample, samples, 3)
        resized[0], resized[1], resized[2] = side, side, 3


@cfunc(_RUN, cache=True)
def _resize_run(outs, _out_shapes, _out_ndims, _outs, ins, in_shapes, _in_ndims, _ins):  # type: ignore[no-untyped-def]
    side, shape = _shape_of(in_shapes, 0, 1)[0], _shape_of(in_shapes, 1, 3)
    geometry = carray(_data_pointer(ins, 2), GEOMETRY_WIDTH, np.int32)
    resize_window(
        carray(_data_pointer(outs, 0), (side, side, 3), np.uint8),
        carray(_data_pointer(ins, 1), (shape[0], shape[1], 3), np.uint8),
        geometry[RESIZED_H],
        geometry[RESIZED_W],
        geometry[CROP_Y],
        geometry[CROP_X],
    )


@cache
def _resize_operator() -> Any:
    return _CachedNumbaFunction(
        run_fn=_resize_run,
        setup_fn=_resize_setup,
        out_types=[types.UINT8],
        outs_ndim=[3],
        in_types=[types.UINT8, types.UINT8, types.INT32],
        ins_ndim=[1, 3, 1],
    )


@cfunc(_SETUP, cache=True)
def _colour_setup(out_shapes, _out_ndims, _outs, _in_shapes, _in_ndims, _ins, samples):  # type: ignore[no-untyped-def]
    for sample in range(samples):
        for output in range(2):
            matrix = _sample_shape(out_shapes, output, sample, samples, 2)
            matrix[0], matrix[1] = 3, 3
        _sample_shape(out_shapes, 2, sample, samples, 1)[0] = 3


@cfunc(_RUN, cache=True)
def _colour_run(outs, _out_shapes, _out_ndims, _outs, ins, _in_shapes, _in_ndims, _ins):  # type: ignore[no-untyped-def]
    write_colour_parts(
        carray(_data_pointer(outs, 0), (3, 3), np.float32),
        carray(_data_pointer(outs, 1), (3, 3), np.float32),
        carray(_data_pointer(outs, 2), 3, np.float32),
        carray(_data_pointer(ins, 0), COLOUR_WIDTH, np.float32),
    )


@cache
def _colour_operator() -> Any:
    return _CachedNumbaFunction(
        run_fn=_colour_run,
        setup_fn=_colour_setup,
        out_types=[types.FLOAT, types.FLOAT, types.FLOAT],
        outs_ndim=[2, 2, 1],
        in_types=[types.FLOAT],
        ins_ndim=[1],
    )


def numba_views(canvas: Node, images: Node, geometry: Node, matrices: Node, colour: Node) -> Node:
    """uint8 [V, S, S, 3] views of decoded uint8 images in host memory: resized, colours changed once, then V warps.

    `canvas` is uint8 [S]: an operator learns the shapes of its inputs, not what is in them, before it says its own.
    """
    views, _words, _resized = _views_operator()(canvas, matrices, images, geometry, colour)
    return views


def numba_resize(canvas: Node, images: Node, geometry: Node) -> Node:
    """Decoded uint8 images in host memory at the side of the views, uint8 [S, S, 3]; `canvas` as `numba_views`."""
    return _resize_operator()(canvas, images, geometry)


def dali_resize(images: Node, geometry: Node, *, center: bool) -> Node:
    """Decoded images at the side of the views, from DALI's own operators, in host or GPU memory."""
    size = fn.cast(geometry[RESIZED_H : RESIZED_H + 2], dtype=types.FLOAT)
    images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    if center:
        images = fn.slice(images, start=geometry[CROP_Y : CROP_Y + 2], shape=geometry[CROP_H : CROP_H + 2], axes=(0, 1))
    return images


def dali_views(images: Node, matrices: Node, colour: Node, views: int) -> Node:
    """uint8 [V, S, S, 3] views of uint8 [S, S, 3] images, from DALI's own operators, in host or GPU memory."""
    # What is asked of the CPU does not hang on the mean, or the CPU's operators would wait for the GPU's.
    linear, pivots, shift = _colour_operator()(colour)
    mean = fn.reductions.mean(images, axes=(0, 1), keep_dims=True)
    moved = fn.coord_transform(images, M=linear, dtype=types.FLOAT) + fn.coord_transform(mean, M=pivots, T=shift)
    images = fn.cast(moved, dtype=types.UINT8)
    frames = fn.sequence_rearrange(fn.expand_dims(images, axes=[0], new_axis_names="F"), new_order=[0] * views)
    # DALI's coordinates start at the corner of a pixel, ours at its centre: the same matrix, with shifted offsets.
    turn = matrices[:, :, 0:2]
    offset = matrices[:, :, 2:3] + 0.5 - 0.5 * fn.reductions.sum(turn, axes=[2], keep_dims=True)
    corner_matrices = fn.cat(turn, offset, axis=2)
    return fn.warp_affine(frames, matrix=fn.per_frame(corner_matrices), inverse_map=True, fill_value=0)
