"""The CPU warp: one uint8 image into V uint8 views, in numba.

The image is packed once, after its colours were changed, as three 21-bit lanes of a uint64, with a border of one black
pixel. A view's pixel is then four loads, four multiplications by 13-bit weights that sum to 8192, and one rounding
shift, for all three channels together (255 * 8192 + 4096 < 2**21, so no lane overflows). Coordinates are 31.32 fixed
point; the part of each row whose source lies inside is computed beforehand, so the inner loop checks nothing.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_ONE = 1 << 32  # fixed point of coordinates
_WEIGHT_BITS = 13
_HALF_LANES = np.uint64((4096) | (4096 << 21) | (4096 << 42))


@njit(cache=True, nogil=True, inline="always")
def _clip_round(value):  # type: ignore[no-untyped-def]
    return np.uint64(min(max(value + np.float32(0.5), np.float32(0.0)), np.float32(255.0)))


@njit(cache=True, nogil=True)
def pack(scratch, image_SSC, colour_34):  # type: ignore[no-untyped-def]
    """Pack an image with its colours changed into the black-bordered uint64 scratch, [S + 2, S + 2]."""
    side = image_SSC.shape[0]
    scratch[0, :] = 0
    scratch[side + 1, :] = 0
    plain = True
    for channel in range(3):
        for k in range(4):
            plain = plain and colour_34[channel, k] == (1.0 if k == channel else 0.0)
    m = colour_34
    for y in range(side):
        row = scratch[y + 1]
        pixels = image_SSC[y]
        row[0] = 0
        row[side + 1] = 0
        if plain:
            for x in range(side):
                row[x + 1] = (
                    np.uint64(pixels[x, 0])
                    | (np.uint64(pixels[x, 1]) << np.uint64(21))
                    | (np.uint64(pixels[x, 2]) << np.uint64(42))
                )
        else:
            for x in range(side):
                r, g, b = np.float32(pixels[x, 0]), np.float32(pixels[x, 1]), np.float32(pixels[x, 2])
                row[x + 1] = (
                    _clip_round(m[0, 0] * r + m[0, 1] * g + m[0, 2] * b + m[0, 3])
                    | (_clip_round(m[1, 0] * r + m[1, 1] * g + m[1, 2] * b + m[1, 3]) << np.uint64(21))
                    | (_clip_round(m[2, 0] * r + m[2, 1] * g + m[2, 2] * b + m[2, 3]) << np.uint64(42))
                )


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
    return (begin, end) if begin < end else (first, first)


@njit(cache=True, nogil=True)
def warp_packed(view_SSC, scratch, buffer, matrix_23):  # type: ignore[no-untyped-def]
    """Write one view, uint8 [S, S, 3], of a packed image; `buffer` holds one row, uint64 [S]."""
    side = view_SSC.shape[0]
    width = side + 2
    flat = scratch.ravel()
    dx, dy = np.int64(np.rint(matrix_23[0, 0] * _ONE)), np.int64(np.rint(matrix_23[1, 0] * _ONE))
    low, high = np.int64(0), np.int64(side + 1) * _ONE
    rounding = np.int64(1 << (31 - _WEIGHT_BITS))
    for y in range(side):
        # Coordinates of the bordered image (so + 1), rounded to the weights' grid by one addition.
        sx = np.int64(np.rint((np.float64(matrix_23[0, 1]) * y + matrix_23[0, 2] + 1.0) * _ONE)) + rounding
        sy = np.int64(np.rint((np.float64(matrix_23[1, 1]) * y + matrix_23[1, 2] + 1.0) * _ONE)) + rounding
        first, last = _inside(sx, dx, low, high, np.int64(0), np.int64(side))
        first, last = _inside(sy, dy, low, high, first, last)
        for x in range(first):
            buffer[x] = 0
        for x in range(last, side):
            buffer[x] = 0
        for x in range(first, last):
            ux, uy = np.uint64(sx + x * dx), np.uint64(sy + x * dy)
            fx = (ux >> np.uint64(32 - _WEIGHT_BITS)) & np.uint64(8191)
            fy = (uy >> np.uint64(32 - _WEIGHT_BITS)) & np.uint64(8191)
            w11 = (fx * fy + np.uint64(4096)) >> np.uint64(_WEIGHT_BITS)
            at = (uy >> np.uint64(32)) * np.uint64(width) + (ux >> np.uint64(32))
            buffer[x] = (
                flat[at] * (np.uint64(8192) - fx - fy + w11)
                + flat[at + np.uint64(1)] * (fx - w11)
                + flat[at + np.uint64(width)] * (fy - w11)
                + flat[at + np.uint64(width + 1)] * w11
                + _HALF_LANES
            )
        row = view_SSC[y]
        for x in range(side):
            value = buffer[x]
            row[x, 0] = np.uint8((value >> np.uint64(13)) & np.uint64(255))
            row[x, 1] = np.uint8((value >> np.uint64(34)) & np.uint64(255))
            row[x, 2] = np.uint8((value >> np.uint64(55)) & np.uint64(255))


@njit(cache=True, nogil=True)
def warp_image(views_VSSC, scratch, image_SSC, matrices_V23, colour_34):  # type: ignore[no-untyped-def]
    """Write V views, uint8 [V, S, S, 3], of one uint8 image [S, S, 3].

    `matrices_V23` are float32 target-to-source, `colour_34` is float32, `scratch` is uint64 [S + 2, S + 2].
    """
    pack(scratch, image_SSC, colour_34)
    buffer = np.empty(image_SSC.shape[0], np.uint64)
    for view in range(views_VSSC.shape[0]):
        warp_packed(views_VSSC[view], scratch, buffer, matrices_V23[view])
