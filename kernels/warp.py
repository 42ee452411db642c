"""Warp a batch: `warp` chooses the backend; `warp_reference` is the plain torch reference for tests."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from fast_spatial.kernels.host import cpus_per_process
from fast_spatial.kernels.limits import MAX_SIDE
from fast_spatial.kernels.warp_cpu import warp_image

# B images, V views, S image size, C = 3 channels.
_IDENTITY_34 = np.eye(3, 4, dtype=np.float32)
_local = threading.local()


def warp(images_BSSC: Tensor, matrices_BV23: Tensor, colour_B34: Tensor | None = None) -> Tensor:
    """Views of a batch of images: uint8 [B, V, S, S, 3], on the images' device.

    Args:
        images_BSSC: uint8 [B, S, S, 3].
        matrices_BV23: float32 [B, V, 2, 3], target-to-source pixels (see `kernels.spatial`).
        colour_B34: float32 [B, 3, 4] in units of 255, applied before the warp; pixels outside the image stay black.

    Raises:
        ValueError: on a wrong dtype or shape.

    """
    B, S = images_BSSC.shape[0], images_BSSC.shape[1]
    if images_BSSC.dtype != torch.uint8 or images_BSSC.shape != (B, S, S, 3):
        raise ValueError(f"images are {images_BSSC.dtype} {tuple(images_BSSC.shape)}: expected uint8 [B, S, S, 3]")
    if not 1 <= S <= MAX_SIDE:
        raise ValueError(f"images have size {S}: must be between 1 and {MAX_SIDE}")
    if matrices_BV23.ndim != 4 or matrices_BV23.shape[0] != B or matrices_BV23.shape[2:] != (2, 3):
        raise ValueError(f"matrices have shape {tuple(matrices_BV23.shape)}: expected [{B}, V, 2, 3]")
    if colour_B34 is not None and colour_B34.shape != (B, 3, 4):
        raise ValueError(f"colour has shape {tuple(colour_B34.shape)}: expected [{B}, 3, 4]")
    if images_BSSC.device.type == "cpu":
        return _warp_cpu(images_BSSC, matrices_BV23, colour_B34)
    from fast_spatial.kernels import warp_cuda

    return warp_cuda.warp(images_BSSC, matrices_BV23, colour_B34)


def warp_normalized(
    images_BSSC: Tensor, matrices_BV23: Tensor, scale_C: Tensor, shift_C: Tensor, dtype: torch.dtype
) -> Tensor:
    """Normalized views, the network's input: [B * V, 3, S, S] channels_last, value * scale + shift.

    On a GPU, one kernel packs the images and a second one makes all views.
    """
    if images_BSSC.device.type == "cpu":
        return normalize(warp(images_BSSC, matrices_BV23).flatten(0, 1), scale_C, shift_C, dtype)
    from fast_spatial.kernels import warp_cuda

    return warp_cuda.warp_normalized(images_BSSC, matrices_BV23, None, scale_C, shift_C, dtype)


def normalize(views_NSSC: Tensor, scale_C: Tensor, shift_C: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalize views, uint8 [N, S, S, 3], to [N, 3, S, S] channels_last: value * scale + shift.

    On a GPU, one kernel reads the views once.
    """
    if views_NSSC.device.type == "cpu":
        values = views_NSSC.permute(0, 3, 1, 2).to(torch.float32)
        return torch.addcmul(shift_C.view(3, 1, 1), values, scale_C.view(3, 1, 1)).to(dtype)
    from fast_spatial.kernels import warp_cuda

    return warp_cuda.normalize(views_NSSC, scale_C, shift_C, dtype)


def warp_reference(images_BSSC: Tensor, matrices_BV23: Tensor, colour_B34: Tensor | None = None) -> Tensor:
    """`warp` in plain torch, without the final rounding: float [B, V, S, S, 3] of 255, on any device.

    It computes in the matrices' dtype. Like every backend, it rounds colours to 8 bits before the warp.
    """
    B, V = matrices_BV23.shape[:2]
    S = images_BSSC.shape[1]
    dtype, device = matrices_BV23.dtype, images_BSSC.device
    pixels_BSSC = images_BSSC.to(dtype)
    if colour_B34 is not None:
        m_B11C4 = colour_B34.to(device, dtype)[:, None, None]
        channels = [(pixels_BSSC * m_B11C4[..., c, :3]).sum(dim=-1) + m_B11C4[..., c, 3] for c in range(3)]
        pixels_BSSC = torch.stack(channels, dim=-1).add_(0.5).floor_().clamp_(0, 255)
    # Element by element: a matrix product may run in TF32, whose 10-bit mantissa is off by a tenth of a pixel.
    m_BV2311 = matrices_BV23.to(device)[..., None, None]
    axis = torch.arange(S, dtype=dtype, device=device)
    source_BV2SS = m_BV2311[:, :, :, 0] * axis + m_BV2311[:, :, :, 1] * axis[:, None] + m_BV2311[:, :, :, 2]
    locations = (source_BV2SS.movedim(2, -1) * (2 / max(S - 1, 1)) - 1).reshape(B * V, S, S, 2)
    inputs = pixels_BSSC.permute(0, 3, 1, 2).repeat_interleave(V, dim=0)
    warped = grid_sample(inputs, locations, mode="bilinear", padding_mode="zeros", align_corners=True)
    return warped.permute(0, 2, 3, 1).view(B, V, S, S, 3)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="warp")


def _warp_cpu(images_BSSC: Tensor, matrices_BV23: Tensor, colour_B34: Tensor | None) -> Tensor:
    B, S, _, C = images_BSSC.shape
    views_BVSSC = torch.empty((B, matrices_BV23.shape[1], S, S, C), dtype=torch.uint8)
    images, views = images_BSSC.contiguous().numpy(), views_BVSSC.numpy()
    matrices = np.ascontiguousarray(matrices_BV23.numpy(), np.float32)
    colours = None if colour_B34 is None else np.ascontiguousarray(colour_B34.numpy(), np.float32)

    def warp_one(b: int) -> None:
        scratch = getattr(_local, "scratch", None)
        if scratch is None or scratch.shape != (S + 2, S + 2):
            scratch = _local.scratch = np.empty((S + 2, S + 2), np.int32)
        warp_image(views[b], scratch, images[b], matrices[b], _IDENTITY_34 if colours is None else colours[b])

    for _ in _pool(cpus_per_process()).map(warp_one, range(B)):
        pass
    return views_BVSSC
