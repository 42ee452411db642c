"""Colour jitter and PCA lighting of one image as one 3x4 matrix, applied once, before the image is warped.

The jitter is torchvision's ColorJitter without hue: brightness scales the image, contrast pivots about its mean grey,
saturation pivots about each pixel's grey. All three are affine in the colours, and they commute. Brightness scales the
pivots, too. Contrast moves all greys alike. Saturation keeps every grey, and so their mean. So torchvision's random
order affects only its rounding: on PIL images it truncates and clips to 8 bits after each step. Here colours are
rounded and clipped once.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fast_spatial.kernels.layout import Colour

# ITU-R 601 luma, as PIL's "L".
GREY = (0.299, 0.587, 0.114)


@njit(cache=True, nogil=True)
def write_colour_matrix(out_34, numbers, mean_rgb):  # type: ignore[no-untyped-def]
    """Write the float32 3x4 matrix (colours of 255) of an image's colour numbers and its mean red, green and blue."""
    brightness, contrast = numbers[Colour.BRIGHTNESS], numbers[Colour.CONTRAST]
    saturation = numbers[Colour.SATURATION]
    mean_grey = GREY[0] * mean_rgb[0] + GREY[1] * mean_rgb[1] + GREY[2] * mean_rgb[2]
    for channel in range(3):
        for k in range(3):
            saturated = saturation * (channel == k) + (1.0 - saturation) * GREY[k]
            out_34[channel, k] = brightness * contrast * saturated
        out_34[channel, 3] = brightness * (1.0 - contrast) * mean_grey + numbers[Colour.LIGHTING_RED + channel]


@njit(cache=True, nogil=True)
def write_colour_parts(linear_33, pivots_33, shift_3, numbers):  # type: ignore[no-untyped-def]
    """Write the same transform for an unknown mean: a colour c becomes linear @ c + pivots @ mean + shift."""
    mean, matrix = np.zeros(3, np.float32), np.empty((3, 4), np.float32)
    write_colour_matrix(matrix, numbers, mean)
    linear_33[:], shift_3[:] = matrix[:, :3], matrix[:, 3]
    for k in range(3):
        pivots_33[:, k] = numbers[Colour.BRIGHTNESS] * (1.0 - numbers[Colour.CONTRAST]) * GREY[k]


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
