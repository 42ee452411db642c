"""Max pooling without indices on a GPU, in Triton; channels_last.

PyTorch's kernel also computes the index of each maximum, which only gradients need.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast_spatial.kernels.warp_cuda import current

_BLOCK = 1024


@triton.jit
def _max_pool_kernel(  # type: ignore[no-untyped-def]
    out,
    x,
    height,
    width,
    out_height,
    out_width,
    channels,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr,
    PADDING_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one output row; consecutive values in memory are the channels of one pixel."""
    row = tl.program_id(0)
    image = (row // out_height).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < out_width * channels
    channel = place % channels
    top = (row % out_height) * STRIDE_Y - PADDING_Y
    left = (place // channels) * STRIDE_X - PADDING_X
    of_image = x + image * height * width * channels
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for step_y in tl.static_range(KERNEL_Y):
        for step_x in tl.static_range(KERNEL_X):
            at_y, at_x = top + step_y, left + step_x
            there = inside & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
            at = (at_y * width + at_x) * channels + channel
            value = tl.load(of_image + at, mask=there, other=float("-inf")).to(tl.float32)
            largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + row.to(tl.int64) * out_width * channels + place, largest.to(out.dtype.element_ty), mask=inside)


def max_pool(x_NCHW: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Max pooling of [N, C, H, W], as `torch.nn.functional.max_pool2d`; returns channels_last. NaN propagates."""
    N, C, H, W = x_NCHW.shape
    out_H, out_W = (
        (size + 2 * around - window) // step + 1
        for size, around, window, step in zip((H, W), padding, kernel, stride, strict=True)
    )
    x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
    out_NCHW = torch.empty(
        (N, C, out_H, out_W), dtype=x_NCHW.dtype, device=x_NCHW.device, memory_format=torch.channels_last
    )
    with current(x_NCHW.device):
        _max_pool_kernel[(N * out_H, triton.cdiv(out_W * C, _BLOCK))](
            out_NCHW, x_NCHW, H, W, out_H, out_W, C, *kernel, *stride, *padding, _BLOCK
        )
    return out_NCHW
