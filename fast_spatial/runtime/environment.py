"""Provenance of a result besides its configuration: hardware, system, versions, and the commit of the code.

Importing this module cannot fail for a missing or broken package. Unknown values are None.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fast_spatial.kernels.host import usable_cpus

ROOT = Path(__file__).resolve().parents[2]
# Holds the commit of code without a git checkout, as in an image built without .git.
COMMIT_VARIABLE = "FAST_SPATIAL_COMMIT"
# Holds the command line of the launcher.
COMMAND_VARIABLE = "FAST_SPATIAL_COMMAND"
DALI_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
PACKAGES = (
    *("fast_spatial", "torch", "torchvision", *DALI_PACKAGES, "triton", "numba", "numpy", "pillow"),
    *("scikit-learn", "opencv-python-headless"),
)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
CPU_INFO = Path("/proc/cpuinfo")
DRIVER_INFO = Path("/proc/driver/nvidia/version")
CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
CONTAINER_VARIABLES = ("container", "KUBERNETES_SERVICE_HOST", "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
_TIMEOUT_SEC = 5


def environment() -> dict[str, Any]:
    """All of it as JSON values; takes a fraction of a second, plus the import of torch if needed."""
    cpu, flags = _cpu()
    cuda = _cuda()
    gpus = cuda["gpus"]
    names = sorted(set(gpus))
    shown = [name if gpus.count(name) == 1 else f"{gpus.count(name)} x {name}" for name in names]
    return {
        "hardware": ", ".join([f"{usable_cpus()} cores of an {cpu}", *shown]),
        "cpu_flags": flags,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        **cuda,
        "driver": driver_version(),
        "host": platform.node(),
        "os": platform.platform(),
        "container": in_container(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := package_version(name))},
        "apex": apex_kind(),
        **code_version(),
    }


def package_version(name: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """The version of NVIDIA's driver, such as "580.65.06", or None."""
    try:
        found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)", DRIVER_INFO.read_text(encoding="utf-8"))
    except OSError:  # no driver, or it runs outside this virtual machine
        found = None
    if found:
        return found[1]
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or ""
    return said.split()[0] if re.match(r"\d", said) else None


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA version that NVIDIA's driver supports, such as (13, 0), or None."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def in_container() -> bool:
    """Whether this process runs in a container, judged by files and variables of the common runtimes."""
    return any(mark.exists() for mark in CONTAINER_MARKS) or any(name in os.environ for name in CONTAINER_VARIABLES)


def apex_kind() -> str | None:
    """Which package named apex is installed, found without importing it: only NVIDIA's has optimizers."""
    try:
        spec = importlib.util.find_spec("apex")
    except ValueError:  # a loaded module of this name has no spec
        return "another package"
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_sgd.py").is_file() for folder in folders):
        return "another package"
    return "NVIDIA's" if importlib.util.find_spec("amp_C") else "NVIDIA's, built without its CUDA kernels"


def _cpu() -> tuple[str, list[str]]:
    """(model, supported flags of `CPU_FLAGS`)."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    return name, [flag for flag in CPU_FLAGS if flag in flags]


def _cuda() -> dict[str, Any]:
    """The GPUs visible to torch, and the versions of its CUDA libraries."""
    found: dict[str, Any] = {"gpus": [], "cuda": None, "cudnn": None, "nccl": None}
    try:
        import torch
    except (ImportError, OSError):  # torch or one of its libraries is missing
        return found
    found["cuda"] = torch.version.cuda
    found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if torch.version.cuda and torch.distributed.is_available() and torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def code_version() -> dict[str, Any]:
    """The commit, and whether its files were changed; without a checkout, the commit from `COMMIT_VARIABLE`."""
    said = _git("rev-parse", "--show-toplevel", "HEAD") or ""
    folder, _, commit = said.partition("\n")
    if not commit or Path(folder) != ROOT:  # no checkout, or that of a project with this package installed in it
        return {"commit": os.environ.get(COMMIT_VARIABLE) or None, "dirty": None}
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(*words: str) -> str | None:
    # A checkout mounted into a container has another owner; git refuses it unless it is declared safe.
    return _output("git", "--no-optional-locks", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *words)


def _output(*command: str) -> str | None:
    """The stripped output of a command; None if it is missing, fails or times out."""
    if not shutil.which(command[0]):
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SEC)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
