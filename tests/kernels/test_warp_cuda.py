"""The Triton kernels: compared with the reference in Triton's interpreter, and compiled for GPUs without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

INTERPRETED = """
import numpy as np, torch
from torch.nn.functional import max_pool2d
from fast_spatial.kernels import pool_cuda, warp_cuda
from fast_spatial.kernels.spatial import matrices
from fast_spatial.kernels.warp import normalize, warp_reference

rng = np.random.default_rng(0)
for side in (1, 9, 37, 70):
    B, V = 2, 3
    images = torch.from_numpy(rng.integers(0, 256, (B, side, side, 3)).astype(np.uint8))
    params = rng.uniform(-1, 1, (B, V, 3)) * (180, 0.4, 0.4)
    params[0, 0] = 0
    rows = torch.from_numpy(matrices(params, side))
    colour = torch.eye(3, 4).expand(B, 3, 4) + 0.1 * torch.from_numpy(rng.normal(size=(B, 3, 4))).float()
    colour[:, :, 3] *= 300
    ones, zeros = torch.ones(3), torch.zeros(3)
    for change in (None, colour):
        exact = warp_reference(images, rows.double(), change).flatten(0, 1).permute(0, 3, 1, 2)
        for dtype in (torch.float32, torch.uint8):
            got = warp_cuda.warp_normalized(images, rows, change, ones, zeros, dtype)
            assert got.dtype == dtype and got.shape == (B * V, 3, side, side)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert (got - exact).abs().max() < 0.52, (side, dtype)
        assert (got == exact.round()).double().mean() > 0.98
        if change is None:
            assert torch.equal(got[0], images[0].permute(2, 0, 1))
    scale, shift = torch.tensor([0.017, 0.018, 0.019]), torch.tensor([-2.1, -2.0, -1.8])
    views = got.permute(0, 2, 3, 1)
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 0.02), (torch.float16, 0.002)):
        expected = views.permute(0, 3, 1, 2) * scale.view(3, 1, 1) + shift.view(3, 1, 1)
        for made in (
            warp_cuda.warp_normalized(images, rows, colour, scale, shift, dtype),
            warp_cuda.normalize(views, scale, shift, dtype),
            normalize(views, scale, shift, dtype),
        ):
            assert made.dtype == dtype and made.shape == expected.shape
            assert made.is_contiguous(memory_format=torch.channels_last)
            assert (made.float() - expected).abs().max() <= error

for shape, window in (
    ((2, 64, 9, 13), ((3, 3), (2, 2), (1, 1))),
    ((1, 5, 8, 8), ((2, 2), (2, 2), (0, 0))),
    ((3, 24, 7, 10), ((3, 2), (1, 3), (1, 0))),
    ((1, 200, 12, 40), ((3, 3), (2, 2), (1, 1))),
):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
        x[0, 0, 3, 3], x[0, 1] = float("nan"), float("-inf")
        got = pool_cuda.max_pool(x, *window)
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, max_pool2d(x, *window), rtol=0, atol=0, equal_nan=True)
print("alike")
"""

COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fast_spatial.kernels import pool_cuda, warp_cuda

SIGNATURES = {
    warp_cuda._pack_kernel: ({"words": "*i32", "images": "*u8", "colours": "*fp32"}, ["side"], {"CHANGED": True}),
    warp_cuda._warp_kernel: (
        {"pixels": "*u8", "matrices": "*fp32", "scale": "*fp32", "shift": "*fp32"},
        ["views", "side"],
        {"TILE_Y": 16, "TILE_X": 64},
    ),
    warp_cuda._matrix_kernel: ({"colours": "*fp32", "images": "*u8", "numbers": "*fp32"}, ["pixels"], {}),
    pool_cuda._max_pool_kernel: (
        {},
        ["height", "width", "out_height", "out_width", "channels"],
        {f"{what}_{axis}": 2 for what in ("KERNEL", "STRIDE", "PADDING") for axis in "YX"},
    ),
    warp_cuda._normalize_kernel: ({"views": "*u8", "scale": "*fp32", "shift": "*fp32"}, ["count"], {}),
}
for architecture in (75, 80, 90, 100):
    for kernel, (pointers, integers, constants) in SIGNATURES.items():
        names = kernel.arg_names
        constants = {**constants, **({"BLOCK": 1024} if "BLOCK" in names else {})}
        outs = ["*fp16", "*bf16", "*fp32"] + ["*u8"] * ("x" not in names) if "out" in names else ["*i32"]
        for out in outs:
            if architecture == 75 and out == "*bf16":
                continue
            kinds = {**pointers, **dict.fromkeys(integers, "i32"), **dict.fromkeys(constants, "constexpr")}
            kinds |= {"out": out, "x": out}
            source = ASTSource(kernel, {name: kinds[name] for name in names}, constants)
            made = compile(source, target=GPUTarget("cuda", architecture, 32))
            assert ".entry" in made.asm["ptx"] and made.asm["cubin"]
print("compiled")
"""


def run(script: str, **environment: str) -> str:
    pytest.importorskip("triton")
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def test_interpreted_kernels_are_the_reference():
    assert "alike" in run(INTERPRETED, TRITON_INTERPRET="1")


def test_kernels_compile_for_every_supported_gpu(tmp_path):
    assert "compiled" in run(COMPILED, TRITON_CACHE_DIR=str(tmp_path))
