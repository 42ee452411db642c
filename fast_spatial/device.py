"""How a device computes: its arithmetic, its random state, how much of it a judging pass may take."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kernels.cpus import cpus_per_process
from kernels.sampling import NETWORK, TRAINING, draw_bits, pack_key


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic that an option means on a device; also sets whether float32 products may use TF32."""
    tf32 = "tf32" if name in ("auto", "tf32", "bfloat16", "float16") else "ieee"
    torch.backends.cuda.matmul.fp32_precision = tf32
    torch.backends.cudnn.conv.fp32_precision = tf32  # type: ignore[attr-defined]
    if name == "auto":
        if has_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    return torch.float32 if name == "tf32" else getattr(torch, name)  # type: ignore[no-any-return]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 by itself, without emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an old torch may not tell
    return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@contextlib.contextmanager
def exact_float32(exact: bool) -> Iterator[None]:
    """Keep float32 convolutions and products out of TF32 for a while, if asked to."""
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [owner.fp32_precision for owner in owners]
    try:
        if exact:
            for owner in owners:
                owner.fp32_precision = "ieee"
        yield
    finally:
        for owner, value in zip(owners, before):
            owner.fp32_precision = value


def seed_everything(seed: int, *, deterministic: bool) -> None:
    """Seed the weights (the stream needs none) and choose between repeatable and fast kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(cpus_per_process())
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Make what a network draws in a step (dropout) a function of the position, as all draws of the stream are."""
    torch.manual_seed(int(draw_bits(pack_key(TRAINING, seed), epoch, step, NETWORK, rank)) >> 1)


def default_pass_size(device: torch.device, side: int) -> int:
    """Views in one forward pass where nothing else decides; 0: all, in passes of at most `largest_pass` views.

    A CPU is fastest while a layer's activations stay in its cache: measured with ResNet-18 on 2 cores with 32 MiB, 2^20
    pixels were about best at sides 224, 112, 64 and 32, and four times as many up to half slower.
    """
    return 0 if device.type == "cuda" else max(1, (1 << 20) // side**2)


def largest_pass(side: int) -> int:
    """The most views in one forward pass whose largest activation has fewer than 2^31 elements: 2,674 at 224 px.

    A ResNet's largest has 64 channels at half the side, 16 side^2 elements a view. Beyond 2^31 elements few of cuDNN's
    engines index far enough: on an H200 in bfloat16, one pass over 2,816 views was 10 % slower than two over 1,408.
    """
    return max(1, ((1 << 31) - 1) // (16 * side**2))
