"""The CPU warp: one uint8 image into V uint8 views, in numba.

The colour transform runs once per image, while the image is packed: one int32 word per pixel holds its three channels,
and a border of one black pixel surrounds the image. Then a view's pixel takes two loads (two neighbouring words of its
source row, and of the next), two multiply-adds and one rounding shift, for all channels together. The multiply-adds
combine neighbouring 16-bit numbers with 14-bit weights that sum to 16384. Coordinates are fixed point, computed for
eight pixels at a time. The part of each row that overlaps the image is computed first. Within it, coordinates are only
clamped to the border, so no pixel needs a branch.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_ONE = 1 << 32  # fixed point of a row's coordinates
_FRACTION_BITS = 18  # of a block's coordinates, int32
_WEIGHT_BITS = 14
_BLOCK = 8  # pixels
_X86 = platform.machine() == "x86_64"


@intrinsic
def _blend_block(typing_context, out, words, width, x, y, dx, dy):  # type: ignore[no-untyped-def]
    """Write 8 neighbouring pixels, 24 bytes at the address `out`, from the packed image at the address `words`.

    `width` is the packed image's width. (x, y) is the first pixel's source and (dx, dy) the step per pixel, both int32
    fixed point.
    """
    integers = [types.intp, types.intp, *[types.int32] * 5]
    return types.void(*integers), _emit_blend_block


def _emit_blend_block(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
    """The LLVM code of `_blend_block`: numba does not generate these vector instructions."""
    out, words, width, *source = arguments
    i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
    i16x8, i32x8 = ir.VectorType(i16, 8), ir.VectorType(i32, 8)

    def pick(vector: Any, lanes: list[int], other: Any = None) -> Any:
        mask = ir.Constant(ir.VectorType(i32, len(lanes)), lanes)
        return builder.shuffle_vector(vector, vector if other is None else other, mask)

    def fill(value: Any, lanes: int = _BLOCK) -> Any:
        if isinstance(value, int):
            return ir.Constant(ir.VectorType(i32, lanes), [value] * lanes)
        first = builder.insert_element(ir.Constant(i32x8, ir.Undefined), value, ir.Constant(i32, 0))
        return pick(first, [0] * lanes)

    def clamp(vector: Any, high: Any) -> Any:
        low = builder.select(builder.icmp_signed("<", vector, fill(0)), fill(0), vector)
        return builder.select(builder.icmp_signed(">", low, high), high, low)

    # --- coordinates: word and fraction of each pixel
    last = builder.sub(width, ir.Constant(i32, 1))
    end = builder.sub(builder.shl(fill(last), fill(_FRACTION_BITS)), fill(1))  # the last with a right neighbour
    lane = ir.Constant(i32x8, list(range(_BLOCK)))
    x, y, dx, dy = (fill(value) for value in source)
    u = clamp(builder.add(x, builder.mul(lane, dx)), end)
    v = clamp(builder.add(y, builder.mul(lane, dy)), end)
    column, row = (builder.lshr(c, fill(_FRACTION_BITS)) for c in (u, v))
    at = builder.add(builder.mul(row, fill(width)), column)
    mask = fill((1 << _WEIGHT_BITS) - 1)
    fx, fy = (builder.and_(builder.lshr(c, fill(_FRACTION_BITS - _WEIGHT_BITS)), mask) for c in (u, v))

    # --- weights: two of 16 bits side by side for each row
    product = builder.add(builder.mul(fx, fy), fill(1 << (_WEIGHT_BITS - 1)))
    lower_right = builder.lshr(product, fill(_WEIGHT_BITS))
    upper_right, lower_left = builder.sub(fx, lower_right), builder.sub(fy, lower_right)
    upper_left = builder.sub(builder.sub(fill(1 << _WEIGHT_BITS), fx), lower_left)
    upper = builder.or_(upper_left, builder.shl(upper_right, fill(16)))
    lower = builder.or_(lower_left, builder.shl(lower_right, fill(16)))

    # --- colours
    multiply_add = builder.module.declare_intrinsic(
        "llvm.x86.sse2.pmadd.wd", fnty=ir.FunctionType(ir.VectorType(i32, 4), [i16x8, i16x8])
    )

    def weighted(address: Any, weights: Any, k: int) -> Any:
        """Weighted sum of two neighbours for the k-th pixel: (red, green, blue, 0), int32."""
        pair = builder.load(builder.inttoptr(address, ir.VectorType(i8, 8).as_pointer()), align=1)
        zeros = ir.Constant(pair.type, [0] * 8)
        # (r0, g0, b0, 0, r1, g1, b1, 0) to the 16-bit numbers (r0, r1, g0, g1, b0, b1, 0, 0).
        channels = builder.bitcast(pick(pair, [0, 8, 4, 8, 1, 8, 5, 8, 2, 8, 6, 8, 3, 8, 7, 8], zeros), i16x8)
        weight = builder.bitcast(pick(weights, [k] * 4), i16x8)
        if _X86:
            return builder.call(multiply_add, [channels, weight])
        products = builder.mul(builder.zext(channels, i32x8), builder.zext(weight, i32x8))
        return builder.add(pick(products, [0, 2, 4, 6]), pick(products, [1, 3, 5, 7]))

    row_bytes = builder.shl(builder.zext(width, i64), ir.Constant(i64, 2))
    sums = []
    for k in range(_BLOCK):
        word = builder.zext(builder.extract_element(at, ir.Constant(i32, k)), i64)
        address = builder.add(words, builder.shl(word, ir.Constant(i64, 2)))
        total = builder.add(weighted(address, upper, k), weighted(builder.add(address, row_bytes), lower, k))
        rounded = builder.add(total, fill(1 << (_WEIGHT_BITS - 1), 4))
        sums.append(builder.lshr(rounded, fill(_WEIGHT_BITS, 4)))
    while len(sums) > 1:
        lanes = list(range(2 * sums[0].type.count))
        sums = [pick(a, lanes, b) for a, b in zip(sums[::2], sums[1::2])]
    bytes_ = builder.trunc(sums[0], ir.VectorType(i8, 4 * _BLOCK))
    pixels = pick(bytes_, [4 * k + channel for k in range(_BLOCK) for channel in range(3)])
    builder.store(pixels, builder.inttoptr(out, pixels.type.as_pointer()), align=1)
    return context.get_dummy_value()


@njit(cache=True, nogil=True)
def pack(scratch, image_SSC, colour_34):  # type: ignore[no-untyped-def]
    """Pack an image, after its colour transform, into black-bordered words, int32 [S + 2, S + 2]."""
    side = image_SSC.shape[0]
    scratch[0, :] = 0
    scratch[side + 1, :] = 0
    half, low, high = np.float32(0.5), np.float32(0.0), np.float32(255.0)
    m00, m01, m02, m03 = colour_34[0, 0], colour_34[0, 1], colour_34[0, 2], colour_34[0, 3] + half
    m10, m11, m12, m13 = colour_34[1, 0], colour_34[1, 1], colour_34[1, 2], colour_34[1, 3] + half
    m20, m21, m22, m23 = colour_34[2, 0], colour_34[2, 1], colour_34[2, 2], colour_34[2, 3] + half
    for y in range(side):
        row, pixels = scratch[y + 1], image_SSC[y].ravel()
        row[0] = 0
        row[side + 1] = 0
        for x in range(np.uint32(side)):  # unsigned: numba checks signed indices for wraparound
            r, g, b = np.float32(pixels[3 * x]), np.float32(pixels[3 * x + 1]), np.float32(pixels[3 * x + 2])
            red = np.int32(min(max(m00 * r + m01 * g + m02 * b + m03, low), high))
            green = np.int32(min(max(m10 * r + m11 * g + m12 * b + m13, low), high))
            blue = np.int32(min(max(m20 * r + m21 * g + m22 * b + m23, low), high))
            row[x + 1] = red | (green << np.int32(8)) | (blue << np.int32(16))


@njit(cache=True, nogil=True)
def _inside(start, step, low, high, first, last):  # type: ignore[no-untyped-def]
    """Narrow [first, last) to the x with low <= start + x * step < high (integers)."""
    begin, end = first, last
    if step > 0:
        begin = max(begin, -((start - low) // step))  # ceil((low - start) / step)
        end = min(end, -((start - high) // step))
    elif step < 0:
        begin = max(begin, (start - high) // -step + 1)
        end = min(end, (start - low) // -step + 1)
    elif not low <= start < high:
        end = begin
    return (begin, end) if begin < end else (np.int64(0), np.int64(0))


@njit(cache=True, nogil=True)
def warp_packed(view_SSC, scratch, edge, matrix_23):  # type: ignore[no-untyped-def]
    """Write one view, uint8 [S, S, 3], of a packed image; `edge` is a buffer for one block, uint8 [24]."""
    side = view_SSC.shape[0]
    width = np.int32(side + 2)
    # A row's coordinates are 31.32 fixed point. Each block restarts from them, rounded to the weights' grid.
    dx, dy = np.int64(np.rint(matrix_23[0, 0] * _ONE)), np.int64(np.rint(matrix_23[1, 0] * _ONE))
    drop = np.int64(32 - _FRACTION_BITS)
    half = np.int64(1) << (drop - 1)
    rounding = half + (np.int64(1) << (31 - _WEIGHT_BITS))
    block_dx, block_dy = np.int32((dx + half) >> drop), np.int32((dy + half) >> drop)
    low, high = np.int64(0), np.int64(side + 1) * _ONE
    words, out = scratch.ctypes.data, view_SSC.ctypes.data
    for y in range(side):
        # Coordinates of the bordered image, so + 1.
        sx = np.int64(np.rint((np.float64(matrix_23[0, 1]) * y + matrix_23[0, 2] + 1.0) * _ONE))
        sy = np.int64(np.rint((np.float64(matrix_23[1, 1]) * y + matrix_23[1, 2] + 1.0) * _ONE))
        first, last = _inside(sx, dx, low, high, np.int64(0), np.int64(side))
        first, last = _inside(sy, dy, low, high, first, last)
        first -= first % _BLOCK
        last = min(last + -last % _BLOCK, side)
        row = view_SSC[y]
        row[:first] = 0
        row[last:] = 0
        for x in range(first, last, _BLOCK):
            u, v = np.int32((sx + x * dx + rounding) >> drop), np.int32((sy + x * dy + rounding) >> drop)
            if x + _BLOCK <= side:
                _blend_block(out + 3 * (y * side + x), words, width, u, v, block_dx, block_dy)
            else:
                _blend_block(edge.ctypes.data, words, width, u, v, block_dx, block_dy)
                for k in range(side - x):
                    for channel in range(3):
                        row[x + k, channel] = edge[3 * k + channel]


@njit(cache=True, nogil=True)
def warp_image(views_VSSC, scratch, image_SSC, matrices_V23, colour_34):  # type: ignore[no-untyped-def]
    """Write V views, uint8 [V, S, S, 3], of one uint8 image [S, S, 3]; all arrays are contiguous.

    `matrices_V23` are float32 target-to-source, with steps of less than 1024 pixels; `colour_34` is float32; `scratch`
    is int32 [S + 2, S + 2].
    """
    pack(scratch, image_SSC, colour_34)
    edge = np.empty(3 * _BLOCK, np.uint8)
    for view in range(views_VSSC.shape[0]):
        warp_packed(views_VSSC[view], scratch, edge, matrices_V23[view])
