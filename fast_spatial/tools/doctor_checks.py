"""The checks of `launch.py doctor`: each looks at one thing that training needs, or is faster with.

A broken installation is when people ask, so this module needs Python alone; every check imports what it looks at.
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
# NVIDIA's data-center GPUs with an engine for JPEG, by compute capability; other GPUs have to be asked.
JPEG_CAPABILITIES = ((8, 0), (9, 0), (10, 0), (10, 3))
CGROUP_MEMORY = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
SHARED_MEMORY = Path("/dev/shm")
# A training process has about 40 files open; NCCL adds sockets for every GPU.
DESCRIPTORS = 1024
GIB = 1 << 30
SAMPLE_FILES, SAMPLE_SEC = 256, 2.0


class Finding(NamedTuple):
    """What a check found.

    Attributes:
        state: "ok", "warning" (training can run, but not as it could) or "missing" (it cannot).
        found: what there is.
        fix: what to do, best a line to copy.

    """

    state: str
    found: str
    fix: str = ""


# --- the installation


def check_code() -> Finding:
    """Which code this is."""
    code = code_version()
    version = package_version("fast_spatial")
    commit = f"commit {code['commit'][:10]}" if code["commit"] else "no commit known"
    changed = ", changed since" if code["dirty"] else ""
    return Finding("ok", f"{commit}{changed}; {f'package {version}' if version else 'not installed as a package'}")


def check_system() -> Finding:
    """The operating system."""
    where = "in a container" if in_container() else "in no container"
    if sys.platform != "linux":
        return Finding("missing", platform.platform(), "use Linux: DALI has no other build")
    return Finding("ok", f"{platform.platform()}, {where}, host {platform.node()}")


def check_python() -> Finding:
    """Python's version."""
    if sys.version_info[:2] < PYTHON:
        needed = ".".join(map(str, PYTHON))
        found = f"{platform.python_version()}: {needed} or newer is needed"
        return Finding("missing", found, f"make install PYTHON=python{needed}")
    return Finding("ok", f"{platform.python_version()}, {sys.executable}")


def check_packages() -> Finding:
    """The versions of the packages that the project names."""
    wrong, install = [], []
    requirements = project_requirements()
    if not requirements:
        found = "unknown what is needed: no pyproject.toml here, and fast_spatial is not installed"
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
    return Finding("ok", f"all {len(requirements)} are there, in versions that fit")


def project_requirements() -> list[str]:
    """What the project needs, as "torch>=2.11", of pyproject.toml or of the installed package."""
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
    """Whether a version lies in ">=2.4,<3"."""
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
    """Whether a module can be imported: its package may be there, and broken."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        again = "install" if isinstance(error, ModuleNotFoundError) else "install --force-reinstall --no-cache-dir"
        return Finding("missing", f"it cannot be imported: {first_line(error)}", f"{_pip()} {again} {package}")
    about = str(getattr(found, "__version__", "of an unknown version"))
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
    """GPUs that torch can use; none where it could not be imported before."""
    return len(_capabilities()) if "torch" in sys.modules else 0


def check_driver() -> Finding:
    """NVIDIA's driver, against the CUDA that torch was built for."""
    driver, runs = driver_version(), driver_cuda_version()
    if runs is None:
        if driver is None:
            return Finding("ok", "none")
        return Finding(
            "warning",
            f"{driver} runs this machine, but its libraries are not to be seen here (libcuda.so.1)",
            "docker run --gpus all ... (needs the NVIDIA Container Toolkit)",
        )
    import torch

    about = f"{driver or 'of an unknown version'}, for CUDA up to {runs[0]}.{runs[1]}"
    if torch.version.cuda is None:
        return Finding(
            "warning",
            f"{about}, but torch is built without CUDA",
            f"{_pip()} install --force-reinstall torch torchvision",
        )
    built = int(torch.version.cuda.split(".", maxsplit=1)[0])
    if runs[0] < built:  # within one major version, an older driver does
        return Finding(
            "missing",
            f"{about}: too old for torch, which is built for CUDA {torch.version.cuda}",
            f"update the driver to {DRIVERS.get(built, 'the newest')} or newer (on data-center GPUs, or install "
            f"cuda-compat-{torch.version.cuda.replace('.', '-')})",
        )
    return Finding("ok", about)


def check_gpus() -> Finding:
    """The GPUs: what they are, whether they are free, and whether they compute."""
    import torch

    if not torch.cuda.is_available():
        if driver_cuda_version() is None:
            return Finding(
                "warning",
                "none to be seen: training runs on CPUs",
                f"docker run --gpus all ... (needs driver {DRIVERS[13]} or newer)",
            )
        return Finding(
            "missing",
            "there is a driver, but torch can use no GPU",
            f"look at CUDA_VISIBLE_DEVICES (it is {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}) and nvidia-smi",
        )
    kinds: Counter[str] = Counter()
    crowded = []
    for index, capability in enumerate(_capabilities()):
        name = torch.cuda.get_device_name(index)
        if capability < CAPABILITY:
            return Finding(
                "missing",
                f"GPU {index} ({name}) has compute capability {capability[0]}.{capability[1]}: "
                f"{CAPABILITY[0]}.{CAPABILITY[1]} is needed",
                "leave it out: CUDA_VISIBLE_DEVICES=... names the others",
            )
        if not _computes(index):
            return Finding("missing", f"GPU {index} ({name}) computes wrongly", "nvidia-smi -q -d ECC shows its errors")
        free, total = torch.cuda.mem_get_info(index)
        kinds[f"{name}, {total / GIB:.0f} GiB, compute capability {capability[0]}.{capability[1]}"] += 1
        if free < total / 2:
            crowded.append(f"GPU {index} has {free / GIB:.0f} GiB free")
    about = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if crowded:
        return Finding("warning", f"{about}; {', '.join(crowded)}", "nvidia-smi lists the processes that hold the rest")
    return Finding("ok", about)


def _computes(index: int) -> bool:
    import torch

    return bool(torch.ones(2, device=f"cuda:{index}").sum().item() == 2)


def check_bfloat16() -> Finding:
    """Whether the hardware that would train computes in bfloat16."""
    import torch

    from fast_spatial.runtime.device import has_bfloat16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = "the GPU" if device.type == "cuda" else "this CPU"
    if has_bfloat16(device):
        return Finding("ok", f"{where} has it")
    instead = "float16" if device.type == "cuda" else "float32"
    return Finding("warning", f"{where} lacks it: slower", f"nothing to do: --dtype auto takes {instead} instead")


def check_nccl() -> Finding:
    """What GPUs talk to each other with."""
    import torch

    gpus = len(_capabilities())
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        return Finding("ok", version + ("" if gpus > 1 else " (only several GPUs need it)"))
    if gpus > 1:
        return Finding("missing", f"torch is built without it, which {gpus} GPUs need", f"{_pip()} install torch")
    return Finding("ok", "none; only several GPUs need it")


def check_jpeg_decoder() -> Finding:
    """The engine for JPEG files that some GPUs have, asked of NVIDIA's nvJPEG."""
    capabilities = _capabilities()
    if not capabilities:
        return Finding("ok", "none without a GPU: CPUs decode")
    expected = capabilities[0] in JPEG_CAPABILITIES
    engines = jpeg_engines()
    if engines:
        return Finding("ok", f"{engines} engine{'s' * (engines > 1)} in GPU 0 (says nvJPEG)")
    if engines is None:
        guess = "there should be one" if expected else "unknown"
        return Finding("ok", f"{guess}: nvJPEG could not be asked, this is inferred from the compute capability")
    if expected and in_container():
        return Finding(
            "warning",
            "closed to this container, though such GPUs have one",
            "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility,video ...",
        )
    if expected:
        return Finding(
            "warning",
            "closed, though such GPUs have one",
            "nvidia-smi -q shows driver and MIG mode",
        )
    return Finding("ok", "none in this GPU: its cores decode")


def jpeg_engines() -> int | None:
    """Engines for JPEG in GPU 0; 0 where there are none for this process; None where nvJPEG cannot tell."""
    library = _nvjpeg()
    if library is None:
        return None
    _computes(0)  # nvJPEG answers for the GPU of the current context
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
    """Which decoding gives right pixels here; what was found before is remembered, as for trainings."""
    from fast_spatial.pipelines.inspection.probe import choose
    from fast_spatial.pipelines.placement import HW_DECODER_LOAD

    choice = choose("auto", on_gpu=bool(_capabilities()), hw_decoder_load=HW_DECODER_LOAD)
    about = f"{choice.decoding} ({choice.why})"
    if not any(trial.fault for trial in choice.trials):
        return Finding("ok", about)
    again = "nothing to do: --decode auto takes it; another version of DALI, nvImageCodec or the driver is tried anew"
    return Finding("warning", about, again)


def check_compiler() -> Finding:
    """What Triton compiles its launchers with on GPUs: a C compiler and Python's headers."""
    from fast_spatial.preflight import has_compiler

    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    there = {"C compiler": has_compiler("cc"), "Python.h": header.is_file()}
    lacking = [name for name, found in there.items() if not found]
    if not lacking:
        return Finding("ok", "C compiler and Python.h")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    fix = f"apt-get install gcc python{version}-dev"
    if _capabilities():
        return Finding("missing", f"no {' and no '.join(lacking)}, which Triton needs on GPUs", fix)
    return Finding("ok", f"no {' and no '.join(lacking)}; only GPUs need them: {fix}")


def check_apex() -> Finding:
    """NVIDIA's apex, or the other package of that name."""
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
        return Finding("warning", "another package of that name, not NVIDIA's", f"{_pip()} uninstall apex")
    return Finding("warning", kind, "use --optimizer sgd, or build apex with its CUDA extensions")


# --- the machine


def check_loader() -> Finding:
    """A few JPEG files through the whole loader, on CPUs and on the GPU: decoded, cropped, warped."""
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
                    f"colours come out {error:.0f}/255 off on {device}",
                    f"{_pip()} install --force-reinstall {DALI_PACKAGES[0]}",
                )
    where = " and on the GPU" if len(devices) > 1 else ""
    return Finding("ok", f"JPEG files are decoded, cropped and warped on CPUs{where}")


def _colours_seen(folder: Path, device: Any) -> Any:
    """The middle pixel of every image, as the loader delivers it: float [B, 3]."""
    from fast_spatial.kernels.sampling import EVALUATION, augmentation_settings, pack_key, view_limits
    from fast_spatial.pipelines.dataset import read_index
    from fast_spatial.pipelines.loader import Loader

    images = read_index(folder, "train")
    loader = Loader(
        images,
        limits=view_limits(1, untouched_first=True, degrees=30.0, translate=0.1),
        settings=augmentation_settings(center=True),
        side=32,
        global_batch_size=len(images),
        key=pack_key(EVALUATION, 0),
        train=False,
        device=device,
    )
    (batch,) = loader.epoch(0)
    return batch.views[:, :, 16, 16].float().mean(dim=1).cpu()


def check_cache() -> Finding:
    """Where compiled kernels and the digits are kept."""
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
    """The CPUs that this process may use, of those that there are."""
    present, usable = os.cpu_count() or 1, usable_cpus()
    if usable < present:
        return Finding(
            "warning",
            f"{usable} of {present}: an affinity mask or a container's quota withholds the others",
            "docker run --cpus N ..., or the scheduler's CPUs per task (the loader decodes on CPUs)",
        )
    return Finding("ok", f"{usable}, all usable")


def check_memory() -> Finding:
    """The machine's memory, or the container's limit: a process takes about 4 GiB."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = min([total, *_memory_limits()])
    about = f"{limit / GIB:.1f} GiB" + (f", the limit of a container on {total / GIB:.0f}" if limit < total else "")
    processes = max(1, _gpu_count())
    if limit < 4 * processes * GIB:
        fix = f"docker run --memory {8 * processes}g ..." if limit < total else "a smaller --global-batch-size"
        return Finding("warning", f"{about}; a process takes about 4", fix)
    return Finding("ok", about)


def _memory_limits() -> Iterator[int]:
    for path in CGROUP_MEMORY:
        try:
            yield int(path.read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue


def check_descriptors() -> Finding:
    """How many files and sockets a process may have open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < DESCRIPTORS:
        fix = f"ulimit -n {DESCRIPTORS}" if hard < 0 or hard >= DESCRIPTORS else "docker run --ulimit nofile=65536 ..."
        return Finding("warning", f"{soft} a process: NCCL may need more with many GPUs", fix)
    return Finding("ok", f"{'unlimited' if soft < 0 else soft} a process")


def check_shared_memory() -> Finding:
    """/dev/shm, which NCCL takes for GPUs of one machine; the loader does not."""
    if not SHARED_MEMORY.is_dir():
        return Finding("warning", f"there is no {SHARED_MEMORY}, which several GPUs need", "docker run --ipc=host ...")
    size = shutil.disk_usage(SHARED_MEMORY).total
    about = f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"
    if size >= GIB:
        return Finding("ok", f"{about} at {SHARED_MEMORY}")
    gpus = _gpu_count()
    if gpus > 1:
        found = f"{about}: NCCL may run out of it on {gpus} GPUs"
        return Finding("warning", found, "docker run --ipc=host ... (or --shm-size 8g)")
    return Finding("ok", f"{about}; several GPUs would need more: docker run --ipc=host ...")


# --- folders that were named


def check_data(data: str) -> Finding:
    """The folder of images: its layout, and how fast a sample of its files is read from the disk."""
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
        return Finding("missing", f"{root} has {len(classes)} classes, but no file of it could be read")
    rates = f"{len(sizes) / spent:,.0f} files/s, {sum(sizes) / spent / 1e6:,.0f} MB/s"
    mean = f"{statistics.mean(sizes) / 1e3:.0f} kB"
    return Finding("ok", f"{len(classes)} classes; {len(sizes)} files of {mean} on average read from disk at {rates}")


def _sample(folders: list[Path]) -> Iterator[Path]:
    """Some files of some folders."""
    some = folders[:: max(1, len(folders) // 64)]
    for folder in some:
        with os.scandir(folder) as entries:
            for _, entry in zip(range(max(1, SAMPLE_FILES // len(some))), entries):
                if entry.is_file():
                    yield Path(entry.path)


def _read_from_disk(until: float, path: Path) -> int:
    """The size of a file that was read, and not from memory; 0 if time was up, or it could not be read."""
    if time.perf_counter() > until:
        return 0
    try:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return len(file.read())
    except OSError:
        return 0


def check_out(out: str) -> Finding:
    """The folder for results: whether it can be written, and the space on its disk."""
    folder = next(path for path in (Path(out).absolute(), *Path(out).absolute().parents) if path.exists())
    if not folder.is_dir():
        return Finding("missing", f"{folder} is a file", "name a folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror}"
        return Finding("missing", found, "name another folder, or mount it writable")
    free = shutil.disk_usage(folder).free / GIB
    state = "ok" if free >= 1 else "warning"
    return Finding(state, f"{folder} is writable, {free:.1f} GiB free", "" if free >= 1 else "free some space")


def first_line(error: BaseException) -> str:
    """The first line of an error, or its kind where it says nothing."""
    said = str(error).strip().splitlines()
    return (said[0] if said else type(error).__name__)[:200]
