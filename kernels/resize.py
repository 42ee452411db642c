"""The CPU resize: bilinear with antialiasing, as in PIL and torchvision; only a window of the result is computed.

A target pixel is a weighted sum of the source pixels near its centre. Weights fall linearly to 0 at a distance of one
pixel, or of the shrink factor if that is larger. Rows are summed first, then columns, each rounded to 8 bits. Weights
have 13 bits and sum to 8192, so flat areas do not change. In the second pass, three channels of 21 bits share a uint64.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_WEIGHT_BITS = 13
_ONE = 1 << _WEIGHT_BITS
_HALF = np.int32(_ONE // 2)
_HALF_LANES = np.uint64((_ONE // 2) | ((_ONE // 2) << 21) | ((_ONE // 2) << 42))


@njit(cache=True, nogil=True)
def _taps(source, target, begin, count):  # type: ignore[no-untyped-def]
    """(first source pixel, number of source pixels, weights) of target pixels [begin, begin + count) on one axis."""
    scale = source / target
    support = max(scale, 1.0)
    first, number = np.empty(count, np.int64), np.empty(count, np.int64)
    weights = np.zeros((count, math.ceil(support) * 2 + 1), np.int64)
    for i in range(count):
        centre = (begin + i + 0.5) * scale
        low, high = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), source)
        total = 0.0
        for x in range(low, high):
            total += max(0.0, 1.0 - abs(x + 0.5 - centre) / support)
        left, largest = _ONE, 0
        for k in range(high - low):
            share = max(0.0, 1.0 - abs(low + k + 0.5 - centre) / support) / total
            weights[i, k] = int(share * _ONE + 0.5)
            left -= weights[i, k]
            if weights[i, k] > weights[i, largest]:
                largest = k
        weights[i, largest] += left
        first[i], number[i] = low, high - low
    return first, number, weights


@njit(cache=True, nogil=True)
def resize_window(out_SSC, image_HWC, height, width, top, left):  # type: ignore[no-untyped-def]
    """Write the window at (top, left) of an image resized to height x width; both uint8 with 3 channels, contiguous."""
    rows, columns = out_SSC.shape[0], out_SSC.shape[1]
    first_y, number_y, weights_y = _taps(image_HWC.shape[0], height, top, rows)
    first_x, number_x, weights_x = _taps(image_HWC.shape[1], width, left, columns)
    begin, end = first_x[0], first_x[columns - 1] + number_x[columns - 1]
    sums = np.empty(3 * (end - begin), np.int32)
    packed = np.empty(end - begin, np.uint64)
    for y in range(rows):
        sums[:] = _HALF
        for k in range(number_y[y]):
            weight = np.int32(weights_y[y, k])
            line = image_HWC[first_y[y] + k, begin:end].ravel()
            for i in range(np.uint32(len(sums))):  # unsigned: numba checks signed indices for wraparound
                sums[i] += weight * np.int32(line[i])
        for x in range(np.uint32(len(packed))):
            red, green, blue = (
                sums[3 * x] >> _WEIGHT_BITS,
                sums[3 * x + 1] >> _WEIGHT_BITS,
                sums[3 * x + 2] >> _WEIGHT_BITS,
            )
            packed[x] = np.uint64(red) | (np.uint64(green) << np.uint64(21)) | (np.uint64(blue) << np.uint64(42))
        for x in range(columns):
            total = _HALF_LANES
            for k in range(number_x[x]):
                total += packed[first_x[x] - begin + k] * np.uint64(weights_x[x, k])
            out_SSC[y, x, 0] = (total >> np.uint64(_WEIGHT_BITS)) & np.uint64(255)
            out_SSC[y, x, 1] = (total >> np.uint64(_WEIGHT_BITS + 21)) & np.uint64(255)
            out_SSC[y, x, 2] = (total >> np.uint64(_WEIGHT_BITS + 42)) & np.uint64(255)
