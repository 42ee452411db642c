"""The GPU warp, in Triton: uint8 images and matrices to normalized channels_last views, in float or half precision.

The colour transform runs once per image, while the image is packed: four bytes per pixel hold its three channels, and a
border of one black pixel surrounds the image. Then one launch makes all views of a batch, with four loads per value. It
writes the layout and dtype that a convolution reads. Views are rounded to 8 bits before normalization, as on every
backend.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_spatial.kernels.colour import GREY
from fast_spatial.kernels.layout import Colour

_TILE_Y, _TILE_X = 16, 64
_BLOCK = 1024
_GREY_R, _GREY_G, _GREY_B = (tl.constexpr(share) for share in GREY)
_WIDTH, _LIGHTING = tl.constexpr(len(Colour)), tl.constexpr(int(Colour.LIGHTING_RED))
_BRIGHTNESS, _CONTRAST, _SATURATION = (
    tl.constexpr(int(column)) for column in (Colour.BRIGHTNESS, Colour.CONTRAST, Colour.SATURATION)
)


@triton.jit
def _matrix_kernel(colours, images, numbers, pixels, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """`kernels.colour` on a GPU, one program per image: the mean colour, then the colour matrix that depends on it."""
    image = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    reds, greens, blues = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    start = 0
    while start < pixels:  # not range(): with NumPy 2.5, the interpreter of Triton 3.6 cannot loop to a kernel argument
        inside = start + lane < pixels
        at = images + image * pixels * 3 + (start + lane) * 3
        reds += tl.load(at, mask=inside, other=0).to(tl.int32)
        greens += tl.load(at + 1, mask=inside, other=0).to(tl.int32)
        blues += tl.load(at + 2, mask=inside, other=0).to(tl.int32)
        start += BLOCK
    red, green, blue = tl.sum(reds.to(tl.int64)), tl.sum(greens.to(tl.int64)), tl.sum(blues.to(tl.int64))
    mean_grey = (_GREY_R * red.to(tl.float64) + _GREY_G * green.to(tl.float64) + _GREY_B * blue.to(tl.float64)) / pixels
    drawn = numbers + image * _WIDTH
    brightness, contrast = tl.load(drawn + _BRIGHTNESS).to(tl.float64), tl.load(drawn + _CONTRAST).to(tl.float64)
    saturation = tl.load(drawn + _SATURATION).to(tl.float64)
    for channel in tl.static_range(3):
        row = colours + image * 12 + channel * 4
        own = brightness * contrast * saturation
        grey = brightness * contrast * (1.0 - saturation)
        tl.store(row, (grey * _GREY_R + (own if channel == 0 else 0.0)).to(tl.float32))
        tl.store(row + 1, (grey * _GREY_G + (own if channel == 1 else 0.0)).to(tl.float32))
        tl.store(row + 2, (grey * _GREY_B + (own if channel == 2 else 0.0)).to(tl.float32))
        lighting = tl.load(drawn + _LIGHTING + channel).to(tl.float64)
        tl.store(row + 3, (brightness * (1.0 - contrast) * mean_grey + lighting).to(tl.float32))


@triton.jit
def _colour(m, channel: tl.constexpr, r, g, b):  # type: ignore[no-untyped-def]
    """One channel of a transformed colour, int32 in [0, 255]."""
    at = m + 4 * channel
    value = tl.load(at) * r + tl.load(at + 1) * g + tl.load(at + 2) * b + tl.load(at + 3)
    return tl.minimum(tl.maximum(tl.floor(value + 0.5), 0.0), 255.0).to(tl.int32)


@triton.jit
def _pack_kernel(words, images, colours, side, CHANGED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    image = tl.program_id(0).to(tl.int64)  # only the first axis of a launch exceeds 65535 programs
    width = side + 2
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y, x = place // width - 1, place % width - 1
    inside = (y >= 0) & (y < side) & (x >= 0) & (x < side)
    pixel = images + image * side * side * 3 + (y * side + x) * 3
    r = tl.load(pixel, mask=inside, other=0).to(tl.int32)
    g = tl.load(pixel + 1, mask=inside, other=0).to(tl.int32)
    b = tl.load(pixel + 2, mask=inside, other=0).to(tl.int32)
    if CHANGED:
        m = colours + image * 12
        r_f, g_f, b_f = r.to(tl.float32), g.to(tl.float32), b.to(tl.float32)
        r, g, b = _colour(m, 0, r_f, g_f, b_f), _colour(m, 1, r_f, g_f, b_f), _colour(m, 2, r_f, g_f, b_f)
    word = tl.where(inside, r | (g << 8) | (b << 16), 0)
    tl.store(words + image * width * width + place, word, mask=place < width * width)


@triton.jit
def _of_channel(values, channel):  # type: ignore[no-untyped-def]
    """Select one of three values by channel."""
    return tl.where(channel == 0, tl.load(values), tl.where(channel == 1, tl.load(values + 1), tl.load(values + 2)))


@triton.jit
def _warp_kernel(  # type: ignore[no-untyped-def]
    out, pixels, matrices, scale, shift, views, side, TILE_Y: tl.constexpr, TILE_X: tl.constexpr
):
    """A tile of a view: rows times values of a row, with three values per pixel.

    A thread's values are contiguous, so it writes 16 bytes at once. In return it reads a pixel's corners once per
    channel: these reads hit the cache, while writes make up most of the memory traffic.
    """
    view = tl.program_id(0)
    width = side + 2
    tiles = tl.cdiv(3 * side, TILE_X)
    y = (tl.program_id(1) // tiles) * TILE_Y + tl.arange(0, TILE_Y)[:, None]
    place = (tl.program_id(1) % tiles) * TILE_X + tl.arange(0, TILE_X)[None, :]
    x = place // 3
    channel = place - 3 * x
    m = matrices + view * 6
    y_f, x_f = y.to(tl.float32), x.to(tl.float32)
    # Coordinates of the bordered image, so + 1. Beyond the border, everything is black: clamp.
    end = side + 1.0
    source_x = tl.minimum(tl.maximum(tl.load(m) * x_f + tl.load(m + 1) * y_f + tl.load(m + 2) + 1.0, 0.0), end)
    source_y = tl.minimum(tl.maximum(tl.load(m + 3) * x_f + tl.load(m + 4) * y_f + tl.load(m + 5) + 1.0, 0.0), end)
    left, top = tl.minimum(source_x.to(tl.int32), side), tl.minimum(source_y.to(tl.int32), side)
    fx, fy = source_x - left.to(tl.float32), source_y - top.to(tl.float32)
    at = pixels + (view // views).to(tl.int64) * width * width * 4 + (top * width + left) * 4 + channel
    a, b = tl.load(at).to(tl.float32), tl.load(at + 4).to(tl.float32)
    at += 4 * width
    c, d = tl.load(at).to(tl.float32), tl.load(at + 4).to(tl.float32)
    upper, lower = a + fx * (b - a), c + fx * (d - c)
    value = tl.floor(upper + fy * (lower - upper) + 0.5)
    normalized = value * _of_channel(scale, channel) + _of_channel(shift, channel)
    target = out + view.to(tl.int64) * side * side * 3 + y * (3 * side) + place
    tl.store(target, normalized.to(out.dtype.element_ty), mask=(y < side) & (place < 3 * side))


@triton.jit
def _normalize_kernel(out, views, scale, shift, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    inside = place < count - start
    channel = ((start % 3).to(tl.int32) + place) % 3  # 64-bit remainders are slow: one per block
    value = tl.load(views + start + place, mask=inside, other=0).to(tl.float32)
    # Load six scalars and select: a load per element would be a gather.
    scaled = value * _of_channel(scale, channel) + _of_channel(shift, channel)
    tl.store(out + start + place, scaled.to(out.dtype.element_ty), mask=inside)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device current: Triton launches on the current device, not on that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def colour_matrices(images_BSSC: Tensor, numbers_BN: Tensor) -> Tensor:
    """Each image's colour matrix, float32 [B, 3, 4], from its colour numbers, float32 [B, len(Colour)]."""
    B, S = images_BSSC.shape[:2]
    colours_B34 = torch.empty((B, 3, 4), dtype=torch.float32, device=images_BSSC.device)
    with current(images_BSSC.device):
        _matrix_kernel[(B,)](colours_B34, images_BSSC.contiguous(), numbers_BN.contiguous(), S * S, _BLOCK)
    return colours_B34


def warp(images_BSSC: Tensor, matrices_BV23: Tensor, colour_B34: Tensor | None) -> Tensor:
    """`kernels.warp.warp` on a GPU."""
    B, S = images_BSSC.shape[:2]
    ones, zeros = images_BSSC.new_ones(3, dtype=torch.float32), images_BSSC.new_zeros(3, dtype=torch.float32)
    views = warp_normalized(images_BSSC, matrices_BV23, colour_B34, ones, zeros, torch.uint8)
    return views.permute(0, 2, 3, 1).view(B, -1, S, S, 3)


def warp_normalized(
    images_BSSC: Tensor,
    matrices_BV23: Tensor,
    colour_B34: Tensor | None,
    scale_C: Tensor,
    shift_C: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`kernels.warp.warp_normalized` on a GPU."""
    B, V = matrices_BV23.shape[:2]
    S, device = images_BSSC.shape[1], images_BSSC.device
    width = S + 2
    words_BWW = torch.empty((B, width, width), dtype=torch.int32, device=device)
    colours = words_BWW if colour_B34 is None else colour_B34.to(device, torch.float32).contiguous()
    out_NSSC = torch.empty((B * V, S, S, 3), dtype=dtype, device=device)
    matrices = matrices_BV23.to(device, torch.float32).contiguous()
    tiles = triton.cdiv(S, _TILE_Y) * triton.cdiv(3 * S, _TILE_X)
    with current(device):
        _pack_kernel[(B, triton.cdiv(width * width, _BLOCK))](
            words_BWW, images_BSSC.contiguous(), colours, S, colour_B34 is not None, _BLOCK
        )
        _warp_kernel[(B * V, tiles)](
            out_NSSC, words_BWW.view(torch.uint8), matrices, scale_C, shift_C, V, S, _TILE_Y, _TILE_X
        )
    return out_NSSC.permute(0, 3, 1, 2)


def normalize(views_NSSC: Tensor, scale_C: Tensor, shift_C: Tensor, dtype: torch.dtype) -> Tensor:
    """`kernels.warp.normalize` on a GPU."""
    views_NSSC = views_NSSC.contiguous()
    out_NSSC = torch.empty(views_NSSC.shape, dtype=dtype, device=views_NSSC.device)
    count = views_NSSC.numel()
    with current(views_NSSC.device):
        _normalize_kernel[(triton.cdiv(count, _BLOCK),)](out_NSSC, views_NSSC, scale_C, shift_C, count, _BLOCK)
    return out_NSSC.permute(0, 3, 1, 2)
