"""Counter-based draws: every random number is a pure function of (seed, epoch, image index, stream, draw).

The generator is Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). Its 128-bit
counter holds (draw, stream, epoch, index) and its 64-bit key holds (domain, seed). So no two quantities share a random
number, and none depends on batch size, number of processes or reading order.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fast_spatial.kernels.spatial import write_matrix

# One stream per quantity.
ORDER, CROP, FLIP, JITTER, LIGHTING, WARP, NETWORK = range(7)
# Domains: training and evaluation never share a draw, whatever their seeds.
TRAINING, EVALUATION = 0, 1

# Columns of the int64 header that describes one image of a batch.
LABEL, INDEX, KEY, EPOCH, SIDE, TICKET = range(6)
HEADER_WIDTH = 6
# Columns of the float64 settings that hold a recipe's augmentation.
CENTER, SCALE_MIN, SCALE_MAX, RATIO_MIN, RATIO_MAX, FLIP_PROB, BRIGHTNESS, CONTRAST, SATURATION, LIGHTING_STD = range(
    10
)
SETTINGS_WIDTH = 10
# Columns of the int32 geometry of `draw_image`: box to decode, size to resize it to, crop of the result.
BOX_Y, BOX_X, BOX_H, BOX_W, RESIZED_H, RESIZED_W, CROP_Y, CROP_X, CROP_H, CROP_W = range(10)
GEOMETRY_WIDTH = 10
# Columns of the float32 colour numbers: three factors, and the lighting offsets of red, green and blue (of 255).
COLOUR_BRIGHTNESS, COLOUR_CONTRAST, COLOUR_SATURATION, COLOUR_LIGHTING = range(4)
COLOUR_WIDTH = 6

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MUL_0, _MUL_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_CROP_TRIES = 10

# Principal components of ImageNet's colours, as published with AlexNet-style lighting: eigenvalues and eigenvectors.
PCA_VALUES = (0.2175, 0.0188, 0.0045)
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@njit(cache=True, nogil=True)
def philox(c0, c1, c2, c3, k0, k1):  # type: ignore[no-untyped-def]
    """Philox4x32-10: four 32-bit words (as uint64) from a counter of four and a key of two."""
    for _ in range(10):
        p0, p1 = c0 * _MUL_0, c2 * _MUL_1
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _MASK, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


@njit(cache=True, nogil=True)
def draw_bits(key, epoch, index, stream, draw):  # type: ignore[no-untyped-def]
    """64 random bits. Key, epoch, index (32 bits), stream (16) and draw (16) must be non-negative."""
    key64 = np.uint64(key)
    slot = (np.uint64(stream) << np.uint64(16)) | np.uint64(draw)
    a, b, _, _ = philox(slot, np.uint64(epoch), np.uint64(index), np.uint64(0), key64 & _MASK, key64 >> _SHIFT)
    return (a << _SHIFT) | b


@njit(cache=True, nogil=True)
def uniform(key, epoch, index, stream, draw):  # type: ignore[no-untyped-def]
    """A float64 in [0, 1) with 53 random bits."""
    return np.float64(draw_bits(key, epoch, index, stream, draw) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True, nogil=True)
def _between(low, high, key, epoch, index, stream, draw):  # type: ignore[no-untyped-def]
    return low + (high - low) * uniform(key, epoch, index, stream, draw)


def pack_key(domain: int, seed: int) -> int:
    """The generator's key for a domain (TRAINING or EVALUATION) and a seed.

    Raises:
        ValueError: if the seed is not in [0, 2**31 - 1].

    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed is {seed}: must be between 0 and {2**31 - 1}")
    return (domain << 32) | seed


@njit(cache=True)
def _order_bits(key, epoch, count):  # type: ignore[no-untyped-def]
    bits = np.empty(count, np.uint64)
    for index in range(count):
        bits[index] = draw_bits(key, epoch, index, ORDER, 0)
    return bits


def epoch_order(key: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of `count` images in an epoch: int64 [count], a stable sort by one draw per image."""
    return np.argsort(_order_bits(key, epoch, count), kind="stable").astype(np.int64)


@njit(cache=True, nogil=True)
def _random_box(box, height, width, settings, key, epoch, index):  # type: ignore[no-untyped-def]
    """The crop of torchvision's RandomResizedCrop: ten tries of an area and aspect ratio, then a central crop."""
    low_ratio, high_ratio = settings[RATIO_MIN], settings[RATIO_MAX]
    for attempt in range(_CROP_TRIES):
        draw = 4 * attempt
        area = height * width * _between(settings[SCALE_MIN], settings[SCALE_MAX], key, epoch, index, CROP, draw)
        ratio = math.exp(_between(math.log(low_ratio), math.log(high_ratio), key, epoch, index, CROP, draw + 1))
        w, h = int(np.rint(math.sqrt(area * ratio))), int(np.rint(math.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            box[BOX_Y] = int(_between(0, height - h + 1, key, epoch, index, CROP, draw + 2))
            box[BOX_X] = int(_between(0, width - w + 1, key, epoch, index, CROP, draw + 3))
            box[BOX_H], box[BOX_W] = h, w
            return
    h, w = height, width
    if width / height < low_ratio:
        h = int(np.rint(width / low_ratio))
    elif width / height > high_ratio:
        w = int(np.rint(height * high_ratio))
    box[BOX_Y], box[BOX_X], box[BOX_H], box[BOX_W] = (height - h) // 2, (width - w) // 2, h, w


@njit(cache=True, nogil=True)
def _center_geometry(out, height, width, side):  # type: ignore[no-untyped-def]
    """Resize(256) and CenterCrop(224), with torchvision's rounding, scaled to the image size."""
    short = (side * 256 + 112) // 224
    out[BOX_Y], out[BOX_X], out[BOX_H], out[BOX_W] = 0, 0, height, width
    if height <= width:
        out[RESIZED_H], out[RESIZED_W] = short, short * width // height
    else:
        out[RESIZED_H], out[RESIZED_W] = short * height // width, short
    out[CROP_Y] = int(np.rint((out[RESIZED_H] - side) / 2.0))
    out[CROP_X] = int(np.rint((out[RESIZED_W] - side) / 2.0))


@njit(cache=True, nogil=True)
def _normal(key, epoch, index, stream, draw):  # type: ignore[no-untyped-def]
    """A standard normal number from two uniform draws (Box-Muller)."""
    radius = math.sqrt(-2.0 * math.log(1.0 - uniform(key, epoch, index, stream, 2 * draw)))
    return radius * math.cos(2.0 * math.pi * uniform(key, epoch, index, stream, 2 * draw + 1))


@njit(cache=True, nogil=True)
def _draw_colour(colour, settings, key, epoch, index):  # type: ignore[no-untyped-def]
    for i in range(3):
        strength = settings[BRIGHTNESS + i]
        colour[i] = _between(max(0.0, 1.0 - strength), 1.0 + strength, key, epoch, index, JITTER, i)
    for channel in range(3):
        colour[COLOUR_LIGHTING + channel] = 0.0
    if settings[LIGHTING_STD] > 0:
        for component in range(3):
            alpha = settings[LIGHTING_STD] * _normal(key, epoch, index, LIGHTING, component)
            for channel in range(3):
                shift = 255.0 * alpha * PCA_VALUES[component] * PCA_VECTORS[channel][component]
                colour[COLOUR_LIGHTING + channel] += shift


@njit(cache=True, nogil=True)
def _draw_matrices(matrices_V23, limits_V2, side, flip, key, epoch, index):  # type: ignore[no-untyped-def]
    for view in range(limits_V2.shape[0]):
        degrees, translate = limits_V2[view, 0], limits_V2[view, 1]
        angle = _between(-degrees, degrees, key, epoch, index, WARP, 3 * view)
        tx = _between(-translate, translate, key, epoch, index, WARP, 3 * view + 1)
        ty = _between(-translate, translate, key, epoch, index, WARP, 3 * view + 2)
        write_matrix(matrices_V23[view], angle, tx, ty, side, flip)


@njit(cache=True, nogil=True)
def draw_image(geometry, colour, matrices_V23, header, shape_HWC, limits_V2, settings):  # type: ignore[no-untyped-def]
    """Draw the whole augmentation of one image.

    Outputs: `geometry`, int32 [GEOMETRY_WIDTH]; `colour`, float32 [COLOUR_WIDTH]; the views' target-to-source
    `matrices_V23`, float32 [V, 2, 3], which include the horizontal flip.

    Inputs: `header`, int64 [HEADER_WIDTH]; the encoded image's `shape_HWC`, int64 [3]; `limits_V2`, float64 [V, 2] of
    degrees and fraction of the image size (zeros give the identity view); `settings`, float64 [SETTINGS_WIDTH].
    """
    key, epoch, index, side = header[KEY], header[EPOCH], header[INDEX], header[SIDE]
    if settings[CENTER] > 0:
        _center_geometry(geometry, shape_HWC[0], shape_HWC[1], side)
    else:
        _random_box(geometry, shape_HWC[0], shape_HWC[1], settings, key, epoch, index)
        geometry[RESIZED_H], geometry[RESIZED_W], geometry[CROP_Y], geometry[CROP_X] = side, side, 0, 0
    geometry[CROP_H], geometry[CROP_W] = side, side
    _draw_colour(colour, settings, key, epoch, index)
    flip = uniform(key, epoch, index, FLIP, 0) < settings[FLIP_PROB]
    _draw_matrices(matrices_V23, limits_V2, side, flip, key, epoch, index)


@njit(cache=True)
def _draw_batch(matrices_BV23, limits_V2, side, key, epoch, indices):  # type: ignore[no-untyped-def]
    for b in range(indices.shape[0]):
        _draw_matrices(matrices_BV23[b], limits_V2, side, False, key, epoch, indices[b])


def draw_matrices(
    key: int, epoch: int, indices: NDArray[np.int64], limits_V2: NDArray[np.float64], side: int
) -> NDArray[np.float32]:
    """The matrices, float32 [B, V, 2, 3], that `draw_image` draws for unflipped images at `indices`, int64 [B]."""
    out = np.empty((len(indices), len(limits_V2), 2, 3), np.float32)
    _draw_batch(out, limits_V2, side, key, epoch, np.ascontiguousarray(indices, np.int64))
    return out


def view_limits(views: int, *, untouched_first: bool, degrees: float, translate: float) -> NDArray[np.float64]:
    """Limits of each view, float64 [V, 2]: the identity view if `untouched_first`, then `views` random ones."""
    rows = [(0.0, 0.0)] * untouched_first + [(degrees, translate)] * views
    return np.array(rows, np.float64).reshape(-1, 2)


def augmentation_settings(
    *,
    center: bool,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_prob: float = 0.0,
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0),
    lighting_std: float = 0.0,
) -> NDArray[np.float64]:
    """A recipe's augmentation as the float64 [SETTINGS_WIDTH] row that `draw_image` reads."""
    return np.array([float(center), *scale, *ratio, flip_prob, *jitter, lighting_std], np.float64)
