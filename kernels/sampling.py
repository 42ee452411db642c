"""Counter-based draws: every random number is a pure function of (seed, epoch, image index, stream, draw).

The generator is Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). Its 128-bit
counter holds (draw, stream, epoch, index) and its 64-bit key holds (domain, seed). So no two quantities share a random
number, and none depends on batch size, number of processes or reading order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fast_spatial.kernels.layout import Colour, Geometry, Header, Setting
from fast_spatial.kernels.limits import STILL, SpatialLimits
from fast_spatial.kernels.spatial import write_matrix

# One stream per quantity.
ORDER, CROP, FLIP, JITTER, LIGHTING, WARP, NETWORK = range(7)
# Domains: training and evaluation never share a draw, whatever their seeds.
TRAINING, EVALUATION = 0, 1

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MUL_0, _MUL_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_CROP_TRIES = 10

# Principal components of ImageNet's colours, as published with AlexNet-style lighting: eigenvalues and eigenvectors.
PCA_VALUES = (0.2175, 0.0188, 0.0045)
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@dataclass(frozen=True)
class Augmentation:
    """Crop, flip and colours of an image.

    Attributes:
        center: Resize(256) and CenterCrop(224), scaled to the image size, instead of RandomResizedCrop.
        scale: range of the random crop's area, as a fraction of the image's area.
        ratio: range of the random crop's aspect ratio.
        flip_prob: probability of a horizontal flip.
        jitter: strengths of brightness, contrast and saturation.
        lighting_std: standard deviation of the PCA lighting.

    """

    center: bool
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.0
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    lighting_std: float = 0.0

    def row(self) -> NDArray[np.float64]:
        """The settings that `draw_image` reads, float64 [len(Setting)]."""
        row = np.empty(len(Setting), np.float64)
        row[Setting.CENTER], row[Setting.FLIP_PROB] = self.center, self.flip_prob
        row[Setting.SCALE_MIN], row[Setting.SCALE_MAX] = self.scale
        row[Setting.RATIO_MIN], row[Setting.RATIO_MAX] = self.ratio
        row[Setting.BRIGHTNESS], row[Setting.CONTRAST], row[Setting.SATURATION] = self.jitter
        row[Setting.LIGHTING_STD] = self.lighting_std
        return row


@dataclass(frozen=True)
class Views:
    """The views of each image: the identity view if `untouched_first`, then random ones within the limits.

    Attributes:
        random: number of random views.
        limits: limits of the random views.
        untouched_first: whether the first view is the identity view.

    """

    random: int
    limits: SpatialLimits = STILL
    untouched_first: bool = True

    def __len__(self) -> int:
        return self.untouched_first + self.random

    def rows(self) -> NDArray[np.float64]:
        """The limits that `draw_image` reads, float64 [V, 2] of degrees and fraction of the image size."""
        rows = [(0.0, 0.0)] * self.untouched_first + [(self.limits.degrees, self.limits.translate)] * self.random
        return np.array(rows, np.float64).reshape(-1, 2)


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
    low_scale, high_scale = settings[Setting.SCALE_MIN], settings[Setting.SCALE_MAX]
    low_ratio, high_ratio = settings[Setting.RATIO_MIN], settings[Setting.RATIO_MAX]
    for attempt in range(_CROP_TRIES):
        draw = 4 * attempt
        area = height * width * _between(low_scale, high_scale, key, epoch, index, CROP, draw)
        ratio = math.exp(_between(math.log(low_ratio), math.log(high_ratio), key, epoch, index, CROP, draw + 1))
        w, h = int(np.rint(math.sqrt(area * ratio))), int(np.rint(math.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            box[Geometry.BOX_Y] = int(_between(0, height - h + 1, key, epoch, index, CROP, draw + 2))
            box[Geometry.BOX_X] = int(_between(0, width - w + 1, key, epoch, index, CROP, draw + 3))
            box[Geometry.BOX_H], box[Geometry.BOX_W] = h, w
            return
    h, w = height, width
    if width / height < low_ratio:
        h = int(np.rint(width / low_ratio))
    elif width / height > high_ratio:
        w = int(np.rint(height * high_ratio))
    box[Geometry.BOX_Y], box[Geometry.BOX_X] = (height - h) // 2, (width - w) // 2
    box[Geometry.BOX_H], box[Geometry.BOX_W] = h, w


@njit(cache=True, nogil=True)
def _center_geometry(out, height, width, side):  # type: ignore[no-untyped-def]
    """Resize(256) and CenterCrop(224), with torchvision's rounding, scaled to the image size."""
    short = (side * 256 + 112) // 224
    out[Geometry.BOX_Y], out[Geometry.BOX_X] = 0, 0
    out[Geometry.BOX_H], out[Geometry.BOX_W] = height, width
    if height <= width:
        out[Geometry.RESIZED_H], out[Geometry.RESIZED_W] = short, short * width // height
    else:
        out[Geometry.RESIZED_H], out[Geometry.RESIZED_W] = short * height // width, short
    out[Geometry.CROP_Y] = int(np.rint((out[Geometry.RESIZED_H] - side) / 2.0))
    out[Geometry.CROP_X] = int(np.rint((out[Geometry.RESIZED_W] - side) / 2.0))


@njit(cache=True, nogil=True)
def _normal(key, epoch, index, stream, draw):  # type: ignore[no-untyped-def]
    """A standard normal number from two uniform draws (Box-Muller)."""
    radius = math.sqrt(-2.0 * math.log(1.0 - uniform(key, epoch, index, stream, 2 * draw)))
    return radius * math.cos(2.0 * math.pi * uniform(key, epoch, index, stream, 2 * draw + 1))


@njit(cache=True, nogil=True)
def _draw_colour(colour, settings, key, epoch, index):  # type: ignore[no-untyped-def]
    for i in range(3):
        strength = settings[Setting.BRIGHTNESS + i]
        colour[i] = _between(max(0.0, 1.0 - strength), 1.0 + strength, key, epoch, index, JITTER, i)
    for channel in range(3):
        colour[Colour.LIGHTING_RED + channel] = 0.0
    if settings[Setting.LIGHTING_STD] > 0:
        for component in range(3):
            alpha = settings[Setting.LIGHTING_STD] * _normal(key, epoch, index, LIGHTING, component)
            for channel in range(3):
                shift = 255.0 * alpha * PCA_VALUES[component] * PCA_VECTORS[channel][component]
                colour[Colour.LIGHTING_RED + channel] += shift


@njit(cache=True, nogil=True)
def _draw_warp(limits_V2, key, epoch, index, view):  # type: ignore[no-untyped-def]
    """(degrees, tx, ty) of one view; translations as a fraction of the image size."""
    degrees, translate = limits_V2[view, 0], limits_V2[view, 1]
    angle = _between(-degrees, degrees, key, epoch, index, WARP, 3 * view)
    tx = _between(-translate, translate, key, epoch, index, WARP, 3 * view + 1)
    ty = _between(-translate, translate, key, epoch, index, WARP, 3 * view + 2)
    return angle, tx, ty


@njit(cache=True, nogil=True)
def _draw_matrices(matrices_V23, limits_V2, side, flip, key, epoch, index):  # type: ignore[no-untyped-def]
    for view in range(limits_V2.shape[0]):
        angle, tx, ty = _draw_warp(limits_V2, key, epoch, index, view)
        write_matrix(matrices_V23[view], angle, tx, ty, side, flip)


@njit(cache=True, nogil=True)
def draw_image(geometry, colour, matrices_V23, header, shape_HWC, limits_V2, settings):  # type: ignore[no-untyped-def]
    """Draw the whole augmentation of one image.

    Outputs: `geometry`, int32 [len(Geometry)]; `colour`, float32 [len(Colour)]; the views' target-to-source
    `matrices_V23`, float32 [V, 2, 3], which include the horizontal flip.

    Inputs: `header`, int64 [len(Header)]; the encoded image's `shape_HWC`, int64 [3]; `limits_V2`, float64 [V, 2] of
    degrees and fraction of the image size (zeros give the identity view); `settings`, float64 [len(Setting)].
    """
    key, epoch, index, side = header[Header.KEY], header[Header.EPOCH], header[Header.INDEX], header[Header.SIDE]
    if settings[Setting.CENTER] > 0:
        _center_geometry(geometry, shape_HWC[0], shape_HWC[1], side)
    else:
        _random_box(geometry, shape_HWC[0], shape_HWC[1], settings, key, epoch, index)
        geometry[Geometry.RESIZED_H], geometry[Geometry.RESIZED_W] = side, side
        geometry[Geometry.CROP_Y], geometry[Geometry.CROP_X] = 0, 0
    geometry[Geometry.CROP_H], geometry[Geometry.CROP_W] = side, side
    _draw_colour(colour, settings, key, epoch, index)
    flip = uniform(key, epoch, index, FLIP, 0) < settings[Setting.FLIP_PROB]
    _draw_matrices(matrices_V23, limits_V2, side, flip, key, epoch, index)


@njit(cache=True)
def _draw_batch(matrices_BV23, limits_V2, side, key, epoch, indices):  # type: ignore[no-untyped-def]
    for b in range(indices.shape[0]):
        _draw_matrices(matrices_BV23[b], limits_V2, side, False, key, epoch, indices[b])


def draw_matrices(key: int, epoch: int, indices: NDArray[np.int64], views: Views, side: int) -> NDArray[np.float32]:
    """The matrices, float32 [B, V, 2, 3], that `draw_image` draws for unflipped images at `indices`, int64 [B]."""
    out = np.empty((len(indices), len(views), 2, 3), np.float32)
    _draw_batch(out, views.rows(), side, key, epoch, np.ascontiguousarray(indices, np.int64))
    return out


@njit(cache=True)
def _draw_chosen(warps_B3, limits_V2, key, epoch, indices, choices):  # type: ignore[no-untyped-def]
    for b in range(indices.shape[0]):
        warps_B3[b, 0], warps_B3[b, 1], warps_B3[b, 2] = _draw_warp(limits_V2, key, epoch, indices[b], choices[b])


def draw_warps(
    key: int, epoch: int, indices: NDArray[np.int64], choices: NDArray[np.int64], views: Views
) -> NDArray[np.float64]:
    """The (degrees, tx, ty) that `draw_image` draws for one view of each image, float64 [B, 3].

    Args:
        key: the generator's key, of `pack_key`.
        epoch: the epoch.
        indices: the images' positions in the split, int64 [B].
        choices: the number of the view of each, int64 [B].
        views: the views of an image.

    """
    out = np.empty((len(indices), 3), np.float64)
    _draw_chosen(out, views.rows(), key, epoch, np.ascontiguousarray(indices), np.ascontiguousarray(choices))
    return out
