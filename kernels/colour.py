"""Colour jitter and PCA lighting of one image as one 3x4 matrix, applied once, before the image is warped.

The jitter is torchvision's ColorJitter without hue: brightness scales the image, contrast pivots about its mean grey,
saturation pivots about each pixel's grey, in a random order. All three are affine in the colours and so is the mean
grey, so a sequence of them is one matrix. On PIL images, torchvision truncates and clips to 8 bits after
each; here colours are rounded and clipped once.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.sampling import (
    COLOUR_BRIGHTNESS,
    COLOUR_CONTRAST,
    COLOUR_LIGHTING,
    COLOUR_ORDER,
    COLOUR_SATURATION,
)

# ITU-R 601 luma, as PIL's "L".
_GREY = (0.299, 0.587, 0.114)
# Row i: the order in which 0 = brightness, 1 = contrast, 2 = saturation are applied.
ORDERS = np.array([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)], np.int64)


@njit(cache=True, nogil=True)
def _scale(out_34, factor):  # type: ignore[no-untyped-def]
    for channel in range(3):
        for k in range(4):
            out_34[channel, k] *= factor


@njit(cache=True, nogil=True)
def write_colour_matrix(out_34, numbers, mean_rgb):  # type: ignore[no-untyped-def]
    """Write the float32 3x4 matrix (colours of 255) of an image's colour numbers and its mean red, green and blue."""
    for channel in range(3):
        for k in range(4):
            out_34[channel, k] = 1.0 if k == channel else 0.0
    order = ORDERS[int(numbers[COLOUR_ORDER])]
    for step in range(3):
        factor = numbers[order[step]]
        if factor == 1.0:
            continue
        if order[step] == COLOUR_BRIGHTNESS:
            _scale(out_34, factor)
        elif order[step] == COLOUR_CONTRAST:
            mean_grey = 0.0
            for channel in range(3):
                value = out_34[channel, 3]
                for k in range(3):
                    value += out_34[channel, k] * mean_rgb[k]
                mean_grey += _GREY[channel] * value
            _scale(out_34, factor)
            for channel in range(3):
                out_34[channel, 3] += (1.0 - factor) * mean_grey
        elif order[step] == COLOUR_SATURATION:
            for k in range(4):
                grey = 0.0
                for channel in range(3):
                    grey += _GREY[channel] * out_34[channel, k]
                for channel in range(3):
                    out_34[channel, k] = factor * out_34[channel, k] + (1.0 - factor) * grey
    for channel in range(3):
        out_34[channel, 3] += numbers[COLOUR_LIGHTING + channel]


@njit(cache=True, nogil=True)
def write_mean_rgb(out_3, image_SSC):  # type: ignore[no-untyped-def]
    """Write the mean red, green and blue (float32 [3], of 255) of a uint8 [H, W, 3] image."""
    height, width = image_SSC.shape[0], image_SSC.shape[1]
    red = green = blue = 0
    for y in range(height):
        for x in range(width):
            red += image_SSC[y, x, 0]
            green += image_SSC[y, x, 1]
            blue += image_SSC[y, x, 2]
    out_3[0], out_3[1], out_3[2] = red / (height * width), green / (height * width), blue / (height * width)
