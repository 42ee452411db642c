"""Settings of a device: precision and random seeds; timing of its work."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fast_spatial.kernels.host import cpus_per_process
from fast_spatial.kernels.sampling import NETWORK, TRAINING, draw_bits, pack_key


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a --dtype value on a device. Also enables or disables TF32 for float32 products."""
    tf32 = "tf32" if name in ("auto", "tf32", "bfloat16", "float16") else "ieee"
    torch.backends.cuda.matmul.fp32_precision = tf32
    torch.backends.cudnn.conv.fp32_precision = tf32  # type: ignore[attr-defined]
    if name == "auto":
        if has_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    return torch.float32 if name == "tf32" else getattr(torch, name)  # type: ignore[no-any-return]


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device supports bfloat16 without emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in old versions of torch
    return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@contextlib.contextmanager
def exact_float32(exact: bool) -> Iterator[None]:
    """Disable TF32 for float32 convolutions and products within the context, if `exact`."""
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
    """Seed weight initialization (the data stream has its own keys) and choose deterministic or fast kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(cpus_per_process())
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Make the network's own random draws (dropout) a function of the position, like all draws of the stream."""
    torch.manual_seed(int(draw_bits(pack_key(TRAINING, seed), epoch, step, NETWORK, rank)) >> 1)


def synchronized_time(device: torch.device) -> float:
    """The time in seconds at which a device has finished all work; differences measure work on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
