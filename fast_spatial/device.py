"""How a device computes: its arithmetic, its random state, how much of it a judging pass may take."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator

import numpy as np
import torch

from kernels.cpus import cpus_per_process


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic that an option means on a device; also sets whether float32 products may use TF32."""
    tf32 = "tf32" if name in ("auto", "tf32", "bfloat16", "float16") else "ieee"
    torch.backends.cuda.matmul.fp32_precision = tf32
    torch.backends.cudnn.conv.fp32_precision = tf32  # type: ignore[attr-defined]
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32 if name == "tf32" else getattr(torch, name)  # type: ignore[no-any-return]


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


def default_score_chunk(device: torch.device, side: int) -> int:
    """Views in one judging pass: as many as a quarter of the free memory holds in ResNet-18's widest layers."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    per_view = 3 * 64 * (side / 2) ** 2 * 4 + 2 * 3 * side**2 * 4
    return max(1, min(int(free / 4 / per_view), 1 << 16 if device.type == "cuda" else 1024))
