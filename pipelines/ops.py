"""The steps of the graph that are our own, as DALI operators: drawing an image's augmentation, making its views.

DALI's own `numba_function` compiles a dozen helpers with every pipeline and caches none: seconds per process. In the
end it only hands C functions to its operator, so here those are `numba.cfunc`s with an on-disk cache. They follow the C
interface of DALI's `NumbaFuncImpl` (as `nvidia.dali.plugin.numba` calls it): arrays of pointers to data and shapes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray, cfunc, float32, float64, int32, int64, njit, uint8, uint64, void
from numba.core.types import Array
from numba.extending import overload
from numba.np.unsafe.ndarray import to_fixed_tuple
from nvidia.dali import fn, types
from nvidia.dali.plugin.numba import NumbaFunction, address_as_void_pointer  # type: ignore[attr-defined]

from fast_spatial.kernels.colour import write_colour_matrix, write_colour_parts, write_mean_rgb
from fast_spatial.kernels.layout import Colour, Geometry
from fast_spatial.kernels.resize import resize_window
from fast_spatial.kernels.sampling import draw_image
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
_RUN = void(*(uint64, uint64, uint64, int32) * 2)
# (out shapes, out ndims, outs, in shapes, in ndims, ins, samples) of a batch.
_SETUP = void(*(uint64, uint64, int32) * 2, int32)

_DALI_TYPES = {
    uint8: types.UINT8,
    int32: types.INT32,
    int64: types.INT64,
    float32: types.FLOAT,
    float64: types.FLOAT64,
}


class _Operands(NamedTuple):
    """Types and ranks of an operator's arrays, by which DALI checks its inputs and the C functions read memory."""

    outs: tuple[Array, ...]
    ins: tuple[Array, ...]


# numba compiles the two functions below for the operands of each table. Arrays of several types cannot be indexed in a
# loop, so each version takes the last array, and calls the version for those before it.


def _arrays(data: Any, shapes: Any, kinds: tuple[Array, ...]) -> Any:
    """The inputs or outputs of a sample, as arrays of these kinds, in a run function."""
    raise NotImplementedError("for compiled functions")


@overload(_arrays)
def _compile_arrays(data, shapes, kinds):  # type: ignore[no-untyped-def]
    last = len(kinds) - 1
    if last < 0:
        return lambda data, shapes, kinds: ()
    dtype, ndim = kinds[last].instance_type.dtype, kinds[last].instance_type.ndim

    def arrays(data, shapes, kinds):  # type: ignore[no-untyped-def]
        shape = to_fixed_tuple(_pointed_at(shapes, last, ndim), ndim)
        pointer = carray(address_as_void_pointer(data), last + 1, np.int64)[last]
        return (*_arrays(data, shapes, kinds[:-1]), carray(address_as_void_pointer(pointer), shape, dtype))

    return arrays


def _shapes(pointers: Any, sample: Any, samples: Any, kinds: tuple[Array, ...]) -> Any:
    """The shapes of a sample's inputs or outputs, int64 [ndim], to read or to set, in a setup function."""
    raise NotImplementedError("for compiled functions")


@overload(_shapes)
def _compile_shapes(pointers, sample, samples, kinds):  # type: ignore[no-untyped-def]
    last = len(kinds) - 1
    if last < 0:
        return lambda pointers, sample, samples, kinds: ()
    ndim = kinds[last].instance_type.ndim

    def shapes(pointers, sample, samples, kinds):  # type: ignore[no-untyped-def]
        shape = _pointed_at(pointers, last * samples + sample, ndim)
        return (*_shapes(pointers, sample, samples, kinds[:-1]), shape)

    return shapes


@njit(cache=True)
def _pointed_at(pointers, position, length):  # type: ignore[no-untyped-def]
    """The int64 [length] array at one of several pointers."""
    pointer = carray(address_as_void_pointer(pointers), position + 1, np.int64)[position]
    return carray(address_as_void_pointer(pointer), length, np.int64)


class _CachedNumbaFunction(NumbaFunction):  # type: ignore[misc]
    """DALI's operator around compiled C functions: `run_fn` of signature _RUN, `setup_fn` of signature _SETUP."""

    def _get_run_fn_cpu(self, run_fn: Any, *_: Any) -> int:
        return int(run_fn.address)

    def _get_setup_fn_cpu(self, setup_fn: Any) -> int:
        return int(setup_fn.address)


@cache
def _operator(operands: _Operands, setup: Any, run: Any) -> Any:
    """DALI's operator of two C functions that read and write these arrays."""
    return _CachedNumbaFunction(
        run_fn=run,
        setup_fn=setup,
        out_types=[_DALI_TYPES[kind.dtype] for kind in operands.outs],
        outs_ndim=[kind.ndim for kind in operands.outs],
        in_types=[_DALI_TYPES[kind.dtype] for kind in operands.ins],
        ins_ndim=[kind.ndim for kind in operands.ins],
    )


# (geometry, colour numbers, matrices) of (limits, header, shape, settings).
_DRAW = _Operands(
    outs=(int32[::1], float32[::1], float32[:, :, ::1]),
    ins=(float64[:, ::1], int64[::1], int64[::1], float64[::1]),
)
_GEOMETRY_WIDTH, _COLOUR_WIDTH = len(Geometry), len(Colour)


@cfunc(_SETUP, cache=True)
def _draw_setup(out_shapes, _out_ndims, _outs, in_shapes, _in_ndims, _ins, samples):  # type: ignore[no-untyped-def]
    for sample in range(samples):
        geometry, colour, matrices = _shapes(out_shapes, sample, samples, _DRAW.outs)
        limits, _header, _shape, _settings = _shapes(in_shapes, sample, samples, _DRAW.ins)
        geometry[0], colour[0] = _GEOMETRY_WIDTH, _COLOUR_WIDTH
        matrices[0], matrices[1], matrices[2] = limits[0], 2, 3


@cfunc(_RUN, cache=True)
def _draw_run(outs, out_shapes, _out_ndims, _outs, ins, in_shapes, _in_ndims, _ins):  # type: ignore[no-untyped-def]
    geometry, colour, matrices = _arrays(outs, out_shapes, _DRAW.outs)
    limits, header, shape, settings = _arrays(ins, in_shapes, _DRAW.ins)
    draw_image(geometry, colour, matrices, header, shape, limits, settings)


def draw(header: Node, shape: Node, limits: Node, settings: Node) -> tuple[Node, Node, Node]:
    """(geometry, colour numbers, matrices) of each image; see `kernels.sampling.draw_image`."""
    geometry, colour, matrices = _operator(_DRAW, _draw_setup, _draw_run)(limits, header, shape, settings)
    return geometry, colour, matrices


@njit(cache=True)
def _resize(resized, image, geometry):  # type: ignore[no-untyped-def]
    """The crop of a decoded image at the size of the views."""
    resize_window(
        resized,
        image,
        geometry[Geometry.RESIZED_H],
        geometry[Geometry.RESIZED_W],
        geometry[Geometry.CROP_Y],
        geometry[Geometry.CROP_X],
    )


# (views, the warp's words, resized image) of (canvas, matrices, image, geometry, colour numbers).
_VIEWS = _Operands(
    outs=(uint8[:, :, :, ::1], int32[:, ::1], uint8[:, :, ::1]),
    ins=(uint8[::1], float32[:, :, ::1], uint8[:, :, ::1], int32[::1], float32[::1]),
)


@cfunc(_SETUP, cache=True)
def _views_setup(out_shapes, _out_ndims, _outs, in_shapes, _in_ndims, _ins, samples):  # type: ignore[no-untyped-def]
    for sample in range(samples):
        views, words, resized = _shapes(out_shapes, sample, samples, _VIEWS.outs)
        canvas, matrices, _image, _geometry, _colour = _shapes(in_shapes, sample, samples, _VIEWS.ins)
        side = canvas[0]
        views[0], views[1], views[2], views[3] = matrices[0], side, side, 3
        words[0], words[1] = side + 2, side + 2
        resized[0], resized[1], resized[2] = side, side, 3


@cfunc(_RUN, cache=True)
def _views_run(outs, out_shapes, _out_ndims, _outs, ins, in_shapes, _in_ndims, _ins):  # type: ignore[no-untyped-def]
    views, words, resized = _arrays(outs, out_shapes, _VIEWS.outs)
    _canvas, matrices, image, geometry, colour = _arrays(ins, in_shapes, _VIEWS.ins)
    _resize(resized, image, geometry)
    mean = np.empty(3, np.float32)
    colour_34 = np.empty((3, 4), np.float32)
    write_mean_rgb(mean, resized)
    write_colour_matrix(colour_34, colour, mean)
    warp_image(views, words, resized, matrices, colour_34)


# (resized image) of (canvas, image, geometry).
_RESIZE = _Operands(outs=(uint8[:, :, ::1],), ins=(uint8[::1], uint8[:, :, ::1], int32[::1]))


@cfunc(_SETUP, cache=True)
def _resize_setup(out_shapes, _out_ndims, _outs, in_shapes, _in_ndims, _ins, samples):  # type: ignore[no-untyped-def]
    for sample in range(samples):
        (resized,) = _shapes(out_shapes, sample, samples, _RESIZE.outs)
        canvas, _image, _geometry = _shapes(in_shapes, sample, samples, _RESIZE.ins)
        resized[0], resized[1], resized[2] = canvas[0], canvas[0], 3


@cfunc(_RUN, cache=True)
def _resize_run(outs, out_shapes, _out_ndims, _outs, ins, in_shapes, _in_ndims, _ins):  # type: ignore[no-untyped-def]
    (resized,) = _arrays(outs, out_shapes, _RESIZE.outs)
    _canvas, image, geometry = _arrays(ins, in_shapes, _RESIZE.ins)
    _resize(resized, image, geometry)


# (linear, pivots, shift) of (colour numbers).
_COLOUR = _Operands(outs=(float32[:, ::1], float32[:, ::1], float32[::1]), ins=(float32[::1],))


@cfunc(_SETUP, cache=True)
def _colour_setup(out_shapes, _out_ndims, _outs, _in_shapes, _in_ndims, _ins, samples):  # type: ignore[no-untyped-def]
    for sample in range(samples):
        linear, pivots, shift = _shapes(out_shapes, sample, samples, _COLOUR.outs)
        linear[0], linear[1] = 3, 3
        pivots[0], pivots[1] = 3, 3
        shift[0] = 3


@cfunc(_RUN, cache=True)
def _colour_run(outs, out_shapes, _out_ndims, _outs, ins, in_shapes, _in_ndims, _ins):  # type: ignore[no-untyped-def]
    linear, pivots, shift = _arrays(outs, out_shapes, _COLOUR.outs)
    (colour,) = _arrays(ins, in_shapes, _COLOUR.ins)
    write_colour_parts(linear, pivots, shift, colour)


def numba_views(canvas: Node, images: Node, geometry: Node, matrices: Node, colour: Node) -> Node:
    """uint8 [V, S, S, 3] views of decoded uint8 images in host memory: resized, colours changed once, then V warps.

    `canvas` is uint8 [S]: an operator learns the shapes of its inputs, not what is in them, before it says its own.
    """
    views, _words, _resized = _operator(_VIEWS, _views_setup, _views_run)(canvas, matrices, images, geometry, colour)
    return views


def numba_resize(canvas: Node, images: Node, geometry: Node) -> Node:
    """Decoded uint8 images in host memory at the side of the views, uint8 [S, S, 3]; `canvas` as `numba_views`."""
    return _operator(_RESIZE, _resize_setup, _resize_run)(canvas, images, geometry)


def dali_resize(images: Node, geometry: Node, *, center: bool) -> Node:
    """Decoded images at the side of the views, from DALI's own operators, in host or GPU memory."""
    size = fn.cast(geometry[Geometry.RESIZED_H : Geometry.RESIZED_W + 1], dtype=types.FLOAT)
    images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    if center:
        start = geometry[Geometry.CROP_Y : Geometry.CROP_X + 1]
        shape = geometry[Geometry.CROP_H : Geometry.CROP_W + 1]
        images = fn.slice(images, start=start, shape=shape, axes=(0, 1))
    return images


def dali_views(images: Node, matrices: Node, colour: Node, views: int) -> Node:
    """uint8 [V, S, S, 3] views of uint8 [S, S, 3] images, from DALI's own operators, in host or GPU memory."""
    # What is asked of the CPU does not hang on the mean, or the CPU's operators would wait for the GPU's.
    linear, pivots, shift = _operator(_COLOUR, _colour_setup, _colour_run)(colour)
    mean = fn.reductions.mean(images, axes=(0, 1), keep_dims=True)
    moved = fn.coord_transform(images, M=linear, dtype=types.FLOAT) + fn.coord_transform(mean, M=pivots, T=shift)
    images = fn.cast(moved, dtype=types.UINT8)
    frames = fn.sequence_rearrange(fn.expand_dims(images, axes=[0], new_axis_names="F"), new_order=[0] * views)
    # DALI's coordinates start at the corner of a pixel, ours at its centre: the same matrix, with shifted offsets.
    turn = matrices[:, :, 0:2]
    offset = matrices[:, :, 2:3] + 0.5 - 0.5 * fn.reductions.sum(turn, axes=[2], keep_dims=True)
    corner_matrices = fn.cat(turn, offset, axis=2)
    return fn.warp_affine(frames, matrix=fn.per_frame(corner_matrices), inverse_map=True, fill_value=0)
