"""The checks of `launch.py doctor`: each tests one thing that training needs or that makes it faster.

This module must import on a broken installation, so it needs no third-party package. Each check imports the package
that it tests.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import operator
import os
import platform
import re
import resource
import shlex
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, NamedTuple

from fast_spatial.errors import UserError
from fast_spatial.kernels.host import cache_folder, usable_cpus
from fast_spatial.pipelines.nvjpeg import installed_libraries
from fast_spatial.runtime.environment import (
    DALI_PACKAGES,
    ROOT,
    apex_kind,
    code_version,
    driver_cuda_version,
    driver_version,
    in_container,
    package_version,
)

PYTHON = (3, 11)
# The oldest driver for each CUDA.
DRIVERS = {12: "525", 13: "580"}
CAPABILITY = (7, 5)
# Compute capabilities of NVIDIA's data-center GPUs with a JPEG engine. Other GPUs are queried through nvJPEG.
JPEG_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))
CGROUP_MEMORY = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
SHARED_MEMORY = Path("/dev/shm")
# A training process has about 40 files open; NCCL adds sockets for every GPU.
DESCRIPTORS = 1024
GIB = 1 << 30
SAMPLE_FILES, SAMPLE_SEC = 256, 2.0


class Finding(NamedTuple):
    """Result of a check.

    Attributes:
        state: "ok", "warning" (training runs, but slower or with limits) or "missing" (training cannot run).
        found: the state in words.
        fix: what to do, preferably a command to copy.

    """

    state: str
    found: str
    fix: str = ""


# --- the installation


def check_code() -> Finding:
    """The version of the code."""
    code = code_version()
    version = package_version("fast_spatial")
    commit = f"commit {code['commit'][:10]}" if code["commit"] else "unknown commit"
    changed = ", modified" if code["dirty"] else ""
    return Finding("ok", f"{commit}{changed}; {f'package {version}' if version else 'not installed as a package'}")


def check_system() -> Finding:
    """The operating system."""
    where = "in a container" if in_container() else "not in a container"
    if sys.platform != "linux":
        return Finding("missing", platform.platform(), "use Linux: DALI supports no other system")
    return Finding("ok", f"{platform.platform()}, {where}, host {platform.node()}")


def check_python() -> Finding:
    """Python's version."""
    if sys.version_info[:2] < PYTHON:
        needed = ".".join(map(str, PYTHON))
        found = f"{platform.python_version()}: needs {needed} or newer"
        return Finding("missing", found, f"make install PYTHON=python{needed}")
    return Finding("ok", f"{platform.python_version()}, {sys.executable}")


def check_packages() -> Finding:
    """The versions of the required packages."""
    wrong, install = [], []
    requirements = project_requirements()
    if not requirements:
        found = "requirements unknown: no pyproject.toml, and fast_spatial is not installed"
        return Finding("warning", found, f"{_pip()} install -e . (in the project's folder)")
    for requirement in requirements:
        name, ranges = re.fullmatch(r"([\w.-]+)(.*)", requirement.replace(" ", "")).groups()  # type: ignore[union-attr]
        names = DALI_PACKAGES if name in DALI_PACKAGES else (name,)
        version = next(filter(None, map(package_version, names)), None)
        if version is None or not in_range(version, ranges):
            wrong.append(f"{name} {version} is not {ranges}" if version else f"{name} is not installed")
            install.append(requirement)
    if wrong:
        return Finding("missing", "; ".join(wrong), f"{_pip()} install {' '.join(map(shlex.quote, install))}")
    return Finding("ok", f"all {len(requirements)} required packages are installed in supported versions")


def project_requirements() -> list[str]:
    """Requirements such as "torch>=2.11", from pyproject.toml or the installed package's metadata."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        import tomllib

        found: list[str] = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
        return found
    try:
        return [line for line in requires("fast_spatial") or () if ";" not in line]
    except PackageNotFoundError:
        return []


def in_range(version: str, ranges: str) -> bool:
    """Whether a version satisfies ranges such as ">=2.4,<3"."""
    operators = {">=": operator.ge, "<": operator.lt}
    for part in filter(None, ranges.split(",")):
        sign, bound = re.fullmatch(r"(>=|<)([\d.]+)", part).groups()  # type: ignore[union-attr]
        if not operators[sign](_release(version), _release(bound)):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    numbers = [int(number) for number in re.match(r"\d+(\.\d+)*", version)[0].split(".")]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _pip() -> str:
    return f"{shlex.quote(sys.executable)} -m pip"


def check_import(module: str, package: str) -> Finding:
    """Whether a module can be imported: an installed package may be broken."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        again = "install" if isinstance(error, ModuleNotFoundError) else "install --force-reinstall --no-cache-dir"
        return Finding("missing", f"import failed: {first_line(error)}", f"{_pip()} {again} {package}")
    about = str(getattr(found, "__version__", "unknown version"))
    if module == "torch":
        about += f", built for CUDA {found.version.cuda}" if found.version.cuda else ", built without CUDA"
    return Finding("ok", about)


# --- GPUs


def _capabilities() -> list[tuple[int, int]]:
    """The compute capability of every GPU that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def _gpu_count() -> int:
    """Number of GPUs that torch can use; 0 if torch has not been imported."""
    return len(_capabilities()) if "torch" in sys.modules else 0


def check_driver() -> Finding:
    """NVIDIA's driver, compared with the CUDA version torch was built for."""
    driver, runs = driver_version(), driver_cuda_version()
    if runs is None:
        if driver is None:
            return Finding("ok", "none")
        return Finding(
            "warning",
            f"{driver} is loaded, but its library libcuda.so.1 is not visible",
            "docker run --gpus all ... (needs the NVIDIA Container Toolkit)",
        )
    import torch

    about = f"{driver or 'unknown version'}, for CUDA up to {runs[0]}.{runs[1]}"
    if torch.version.cuda is None:
        return Finding(
            "warning",
            f"{about}, but torch is built without CUDA",
            f"{_pip()} install --force-reinstall torch torchvision",
        )
    built = int(torch.version.cuda.split(".", maxsplit=1)[0])
    if runs[0] < built:  # within one major version, CUDA works with older drivers
        return Finding(
            "missing",
            f"{about}: too old; torch is built for CUDA {torch.version.cuda}",
            f"update the driver to {DRIVERS.get(built, 'the newest')} or newer, or (data-center GPUs only) install "
            f"cuda-compat-{torch.version.cuda.replace('.', '-')}",
        )
    return Finding("ok", about)


def check_gpus() -> Finding:
    """The GPUs: models, free memory, and a test computation on each."""
    import torch

    if not torch.cuda.is_available():
        if driver_cuda_version() is None:
            return Finding(
                "warning",
                "no GPU found: training runs on CPUs",
                f"docker run --gpus all ... (needs driver {DRIVERS[13]} or newer)",
            )
        return Finding(
            "missing",
            "a driver is installed, but torch cannot use any GPU",
            f"check CUDA_VISIBLE_DEVICES (now: {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}) and nvidia-smi",
        )
    kinds: Counter[str] = Counter()
    crowded = []
    for index, capability in enumerate(_capabilities()):
        name = torch.cuda.get_device_name(index)
        if capability < CAPABILITY:
            return Finding(
                "missing",
                f"GPU {index} ({name}) has compute capability {capability[0]}.{capability[1]}: "
                f"needs {CAPABILITY[0]}.{CAPABILITY[1]} or newer",
                "exclude it: set CUDA_VISIBLE_DEVICES to the other GPUs",
            )
        if not _computes(index):
            found = f"GPU {index} ({name}) computes wrong results"
            return Finding("missing", found, "check its errors: nvidia-smi -q -d ECC")
        free, total = torch.cuda.mem_get_info(index)
        kinds[f"{name}, {total / GIB:.0f} GiB, compute capability {capability[0]}.{capability[1]}"] += 1
        if free < total / 2:
            crowded.append(f"GPU {index} has {free / GIB:.0f} GiB free")
    about = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if crowded:
        return Finding("warning", f"{about}; {', '.join(crowded)}", "nvidia-smi lists the processes that use the rest")
    return Finding("ok", about)


def _computes(index: int) -> bool:
    import torch

    return bool(torch.ones(2, device=f"cuda:{index}").sum().item() == 2)


def check_bfloat16() -> Finding:
    """Whether the training device supports bfloat16."""
    import torch

    from fast_spatial.runtime.device import has_bfloat16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = "the GPU" if device.type == "cuda" else "this CPU"
    if has_bfloat16(device):
        return Finding("ok", f"supported by {where}")
    instead = "float16" if device.type == "cuda" else "float32"
    return Finding("warning", f"not supported by {where}: slower", f"no action needed: --dtype auto uses {instead}")


def check_nccl() -> Finding:
    """NCCL, the library for communication between GPUs."""
    import torch

    gpus = len(_capabilities())
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        return Finding("ok", version + ("" if gpus > 1 else " (needed only with several GPUs)"))
    if gpus > 1:
        return Finding("missing", f"torch is built without NCCL, required for {gpus} GPUs", f"{_pip()} install torch")
    return Finding("ok", "not available; needed only with several GPUs")


def check_jpeg_decoder() -> Finding:
    """The GPU's JPEG engine, as reported by NVIDIA's nvJPEG."""
    capabilities = _capabilities()
    if not capabilities:
        return Finding("ok", "no GPU: CPUs decode")
    expected = capabilities[0] in JPEG_CAPABILITIES
    engines = jpeg_engines()
    if engines:
        return Finding("ok", f"{engines} engine{'s' * (engines > 1)} in GPU 0 (reported by nvJPEG)")
    if engines is None:
        guess = "expected from the compute capability" if expected else "unknown"
        return Finding("ok", f"{guess}; nvJPEG gave no answer")
    if expected and in_container():
        return Finding(
            "warning",
            "not accessible in this container, though this GPU model has one",
            "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility,video ...",
        )
    if expected:
        return Finding(
            "warning",
            "not accessible, though this GPU model has one",
            "check the driver and MIG mode: nvidia-smi -q",
        )
    return Finding("ok", "none in this GPU: its CUDA cores decode")


def jpeg_engines() -> int | None:
    """Number of JPEG engines in GPU 0; 0 if this process can use none; None if nvJPEG gives no answer."""
    library = _nvjpeg()
    if library is None:
        return None
    _computes(0)  # creates the CUDA context of GPU 0, which nvJPEG queries
    hardware, no_such_hardware = 3, 7  # NVJPEG_BACKEND_HARDWARE, NVJPEG_STATUS_ARCH_MISMATCH
    handle = ctypes.c_void_p()
    status = library.nvjpegCreateEx(hardware, None, None, 0, ctypes.byref(handle))
    if status != 0:
        return 0 if status == no_such_hardware else None
    engines, cores = ctypes.c_uint(), ctypes.c_uint()
    status = library.nvjpegGetHardwareDecoderInfo(handle, ctypes.byref(engines), ctypes.byref(cores))
    library.nvjpegDestroy(handle)
    return engines.value if status == 0 else None


def _nvjpeg() -> Any:
    for name in [*map(str, installed_libraries()), "libnvjpeg.so.13", "libnvjpeg.so.12"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def check_decoding() -> Finding:
    """The fastest decoding with correct pixels on this machine; results are cached and shared with training."""
    from fast_spatial.pipelines.inspection.probe import choose
    from fast_spatial.pipelines.placement import HW_DECODER_LOAD

    choice = choose("auto", on_gpu=bool(_capabilities()), hw_decoder_load=HW_DECODER_LOAD)
    about = f"{choice.decoding} ({choice.why})"
    if not any(trial.fault for trial in choice.trials):
        return Finding("ok", about)
    again = "no action needed: --decode auto uses it, and probes again when DALI, nvImageCodec or the driver changes"
    return Finding("warning", about, again)


def check_compiler() -> Finding:
    """The C compiler and Python headers, with which Triton compiles its launchers on GPUs."""
    from fast_spatial.preflight import has_compiler

    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    there = {"C compiler": has_compiler("cc"), "Python.h": header.is_file()}
    lacking = [name for name, found in there.items() if not found]
    if not lacking:
        return Finding("ok", "C compiler and Python.h")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    fix = f"apt-get install gcc python{version}-dev"
    if _capabilities():
        return Finding("missing", f"no {' and no '.join(lacking)}: Triton needs them on GPUs", fix)
    return Finding("ok", f"no {' and no '.join(lacking)}; needed only on GPUs: {fix}")


def check_apex() -> Finding:
    """Apex: NVIDIA's, or the unrelated package of the same name."""
    kind = apex_kind()
    if kind is None:
        return Finding("ok", "not installed; only --optimizer apex needs it")
    if kind == "NVIDIA's":
        from fast_spatial.training.optim import find_apex_sgd

        try:
            find_apex_sgd()
        except UserError as error:
            return Finding("warning", f"{kind}, but {first_line(error)}", "use --optimizer sgd")
        return Finding("ok", f"{kind}, with FusedSGD")
    if kind == "another package":
        return Finding("warning", "an unrelated package of the same name, not NVIDIA's", f"{_pip()} uninstall apex")
    return Finding("warning", kind, "use --optimizer sgd, or build apex with its CUDA extensions")


# --- the machine


def check_loader() -> Finding:
    """The whole loader on a few JPEG files, on CPUs and on the GPU: decode, crop, warp."""
    import torch
    from PIL import Image

    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128)]
    devices = ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "train" / "colours"
        root.mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (64, 48), colour).save(root / f"{number}.jpg", quality=95)
        for device in devices:
            seen = _colours_seen(Path(folder), torch.device(device))
            error = (seen - torch.tensor(colours, dtype=seen.dtype)).abs().max().item()
            if error > 8:
                return Finding(
                    "missing",
                    f"colours differ by {error:.0f}/255 on {device}",
                    f"{_pip()} install --force-reinstall {DALI_PACKAGES[0]}",
                )
    where = " and on the GPU" if len(devices) > 1 else ""
    return Finding("ok", f"JPEG files are decoded, cropped and warped on CPUs{where}")


def _colours_seen(folder: Path, device: Any) -> Any:
    """The middle pixel of every image, as the loader delivers it: float [B, 3]."""
    from fast_spatial.kernels.limits import SpatialLimits
    from fast_spatial.kernels.sampling import Augmentation, Views
    from fast_spatial.pipelines.dataset import read_index
    from fast_spatial.pipelines.loader import Loader
    from fast_spatial.pipelines.sampler import BatchSampler

    images = read_index(folder, "train")
    loader = Loader(
        BatchSampler(images, global_batch_size=len(images), seed=0, train=False),
        augmentation=Augmentation(center=True),
        views=Views(1, SpatialLimits(30.0, 0.1)),
        side=32,
        device=device,
    )
    (batch,) = loader.epoch(0)
    return batch.views[:, :, 16, 16].float().mean(dim=1).cpu()


def check_cache() -> Finding:
    """The cache folder of compiled kernels and the digits."""
    folder = cache_folder()
    free = shutil.disk_usage(folder).free / GIB
    about = f"{folder}, {free:.1f} GiB free"
    with tempfile.TemporaryFile(dir=folder):
        pass
    if folder.parent == Path(tempfile.gettempdir()):
        return Finding("warning", f"{about}; the home folder is not writable", "export XDG_CACHE_HOME=FOLDER")
    if free < 1:
        return Finding("warning", about, "export XDG_CACHE_HOME=FOLDER (on another disk)")
    return Finding("ok", about)


def check_cpus() -> Finding:
    """The CPUs this process may use, out of all CPUs of the machine."""
    present, usable = os.cpu_count() or 1, usable_cpus()
    if usable < present:
        return Finding(
            "warning",
            f"{usable} of {present}: an affinity mask or a container's quota excludes the others",
            "docker run --cpus N ..., or the scheduler's CPUs per task (the loader decodes on CPUs)",
        )
    return Finding("ok", f"{usable}, all usable")


def check_memory() -> Finding:
    """The machine's memory, or the container's limit; a process needs about 4 GiB."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = min([total, *_memory_limits()])
    about = f"{limit / GIB:.1f} GiB" + (f", limit of a container ({total / GIB:.0f} in all)" if limit < total else "")
    processes = max(1, _gpu_count())
    if limit < 4 * processes * GIB:
        fix = f"docker run --memory {8 * processes}g ..." if limit < total else "a smaller --global-batch-size"
        return Finding("warning", f"{about}; a process needs about 4 GiB", fix)
    return Finding("ok", about)


def _memory_limits() -> Iterator[int]:
    for path in CGROUP_MEMORY:
        try:
            yield int(path.read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue


def check_descriptors() -> Finding:
    """The limit of open files and sockets per process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < DESCRIPTORS:
        fix = f"ulimit -n {DESCRIPTORS}" if hard < 0 or hard >= DESCRIPTORS else "docker run --ulimit nofile=65536 ..."
        return Finding("warning", f"{soft} per process: NCCL may need more with many GPUs", fix)
    return Finding("ok", f"{'unlimited' if soft < 0 else soft} per process")


def check_shared_memory() -> Finding:
    """The size of /dev/shm. NCCL uses it between GPUs of one machine; the loader does not."""
    if not SHARED_MEMORY.is_dir():
        return Finding("warning", f"{SHARED_MEMORY} does not exist; several GPUs need it", "docker run --ipc=host ...")
    size = shutil.disk_usage(SHARED_MEMORY).total
    about = f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
    if size >= GIB:
        return Finding("ok", f"{about} at {SHARED_MEMORY}")
    gpus = _gpu_count()
    if gpus > 1:
        found = f"{about}: may be too small for NCCL with {gpus} GPUs"
        return Finding("warning", found, "docker run --ipc=host ... (or --shm-size 8g)")
    return Finding("ok", f"{about}; several GPUs need more: docker run --ipc=host ...")


# --- the folders given as --data and --out


def check_data(data: str) -> Finding:
    """The data folder: its layout, and the read rate of a sample of its files from disk."""
    from fast_spatial.data.images import data_folder
    from fast_spatial.pipelines.dataset import check_classes_agree

    try:
        root = data_folder(data)
        classes = check_classes_agree(root)
    except UserError as error:
        return Finding("missing", error.message, error.advice)
    sample = list(_sample([root / "train" / name for name in classes]))
    start, spent = time.perf_counter(), 0.0
    sizes: list[int] = []
    with ThreadPoolExecutor(4 * usable_cpus()) as pool:
        for size in pool.map(partial(_read_from_disk, start + SAMPLE_SEC), sample):
            sizes += [size] if size else []
        spent = time.perf_counter() - start
    if not sizes:
        return Finding("missing", f"{root} has {len(classes)} classes, but none of its files could be read")
    rates = f"{len(sizes) / spent:,.0f} files/s, {sum(sizes) / spent / 1e6:,.0f} MB/s"
    mean = f"{statistics.mean(sizes) / 1e3:.0f} kB"
    return Finding("ok", f"{len(classes)} classes; {len(sizes)} files (mean {mean}) read from disk at {rates}")


def _sample(folders: list[Path]) -> Iterator[Path]:
    """A sample of files from a sample of folders."""
    some = folders[:: max(1, len(folders) // 64)]
    for folder in some:
        with os.scandir(folder) as entries:
            for _, entry in zip(range(max(1, SAMPLE_FILES // len(some))), entries):
                if entry.is_file():
                    yield Path(entry.path)


def _read_from_disk(until: float, path: Path) -> int:
    """The size in bytes of a file, read from disk past the page cache; 0 after `until`, or if it is unreadable."""
    if time.perf_counter() > until:
        return 0
    try:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return len(file.read())
    except OSError:
        return 0


def check_out(out: str) -> Finding:
    """The output folder: whether it is writable, and the free space on its disk."""
    folder = next(path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.exists())
    if not folder.is_dir():
        return Finding("missing", f"{folder} is a file", "choose a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = f"{folder} is not writable: {error.strerror}"
        return Finding("missing", found, "choose another folder, or mount it writable")
    free = shutil.disk_usage(folder).free / GIB
    state = "ok" if free >= 1 else "warning"
    return Finding(state, f"{folder} is writable, {free:.1f} GiB free", "" if free >= 1 else "free some space")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    said = str(error).strip().splitlines()
    return (said[0] if said else type(error).__name__)[:200]
