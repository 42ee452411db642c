"""What a result depends on besides the code."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kernels.cpus import usable_cpus

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "triton", "numba", "numpy", "opencv-python-headless")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def machine() -> dict[str, Any]:
    """Hardware, CPU flags, versions and commit, for a result file."""
    cpu, flags = platform.processor() or platform.machine(), set()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            cpu = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "hardware": f"{usable_cpus()} cores of an {cpu}" + (f", {gpu}" if gpu else ""),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        "gpu": gpu,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
