"""Doctor finds every problem, and prints the command that fixes it."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import types
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from fast_spatial import commands, preflight
from fast_spatial.runtime.environment import package_version
from fast_spatial.tools import doctor
from fast_spatial.tools import doctor_checks as checks
from fast_spatial.tools.doctor import Check, examine, shown, summary
from fast_spatial.tools.doctor_checks import Finding

ROOT = Path(__file__).parents[2]
H100, T4, V100 = ("NVIDIA H100", (9, 0), 80), ("Tesla T4", (7, 5), 16), ("Tesla V100", (7, 0), 32)


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without GPU and driver."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks, "driver_version", lambda: None)
    monkeypatch.setattr(checks, "driver_cuda_version", lambda: None)
    monkeypatch.setattr(checks, "in_container", lambda: False)


@pytest.fixture
def gpus(monkeypatch):
    """A function that simulates GPUs, each (name, compute capability, GiB), with a share of free memory."""

    def give(*kinds, free=1.0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: kinds[index][0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: kinds[index][1])
        memory = [(int(free * gib * checks.GIB), gib * checks.GIB) for _, _, gib in kinds]
        monkeypatch.setattr(torch.cuda, "mem_get_info", memory.__getitem__)
        monkeypatch.setattr(checks, "_computes", lambda _: True)
        monkeypatch.setattr(checks, "driver_version", lambda: "580.65.06")
        monkeypatch.setattr(checks, "driver_cuda_version", lambda: (13, 0))
        monkeypatch.setattr(checks, "in_container", lambda: False)

    return give


def assert_found(finding: Finding, state: str, found: str, fix: str = "") -> None:
    assert finding.state == state, finding
    assert found in finding.found
    assert fix in finding.fix
    assert bool(finding.fix) == (state != "ok"), "every problem has a fix"


# --- the installation


@pytest.mark.parametrize(
    ("commit", "dirty", "found"),
    [("0123456789abcdef", True, "commit 0123456789, modified;"), (None, None, "unknown commit;")],
)
def test_the_code_is_named(monkeypatch, commit, dirty, found):
    monkeypatch.setattr(checks, "code_version", lambda: {"commit": commit, "dirty": dirty})
    assert_found(checks.check_code(), "ok", found)


def test_another_system_than_linux_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert_found(checks.check_system(), "missing", "", "use Linux")


def test_an_old_python_is_refused(monkeypatch):
    assert_found(checks.check_python(), "ok", sys.executable)
    monkeypatch.setattr(checks, "PYTHON", (4, 0))
    assert_found(checks.check_python(), "missing", "needs 4.0 or newer", "PYTHON=python4.0")


def test_pythons_version_is_the_one_of_the_project():
    assert f'requires-python = ">={checks.PYTHON[0]}.{checks.PYTHON[1]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("version", "ranges", "inside"),
    [
        ("2.11", ">=2.11", True),
        ("2.11.0", ">=2.11", True),
        ("2.9.1", ">=2.11", False),
        ("2.14.1+cu130", ">=2.11", True),
        ("2.11.0a0+5228986c39.nv25.05", ">=2.11", True),
        ("3.0.0", ">=2.4,<3", False),
        ("2.99", ">=2.4,<3", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version, ranges, inside):
    assert checks.in_range(version, ranges) is inside


def test_packages_in_other_versions_are_named_with_the_line_that_installs_them(monkeypatch):
    assert_found(
        checks.check_packages(), "ok", f"all {len(checks.project_requirements())} required packages are installed"
    )
    real = package_version
    other = {"torch": "2.5.1", "tqdm": None, "nvidia-dali-cuda130": None, "nvidia-dali-cuda120": "2.5"}
    monkeypatch.setattr(checks, "package_version", lambda name: other[name] if name in other else real(name))
    finding = checks.check_packages()
    assert_found(finding, "missing", "torch 2.5.1 is not >=2.11; tqdm is not installed")
    assert finding.fix.endswith("-m pip install 'torch>=2.11' 'tqdm>=4.66'")


def test_an_installed_package_knows_what_it_needs_without_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setattr(checks, "requires", lambda _: ["torch>=2.11", 'ruff>=0.9; extra == "dev"'])
    assert checks.project_requirements() == ["torch>=2.11"]
    monkeypatch.setattr(checks, "requires", lambda _: [])
    assert_found(checks.check_packages(), "warning", "requirements unknown", "install -e .")


def test_a_module_that_is_missing_or_broken_is_told(monkeypatch, tmp_path):
    assert_found(checks.check_import("torch", "torch"), "ok", torch.__version__)
    assert_found(checks.check_import("nowhere", "thing"), "missing", "No module named 'nowhere'", "pip install thing")
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('operator nms does not exist\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = checks.check_import("broken_module", "thing")
    assert_found(finding, "missing", "operator nms does not exist", "--force-reinstall")
    assert "more" not in finding.found


# --- GPUs


def test_without_a_gpu_there_is_one_warning(no_gpu):
    assert_found(checks.check_gpus(), "warning", "training runs on CPUs", "docker run --gpus all")
    assert_found(checks.check_driver(), "ok", "none")
    assert_found(checks.check_jpeg_decoder(), "ok", "CPUs decode")
    assert_found(checks.check_nccl(), "ok", "needed only with several GPUs")


@pytest.mark.parametrize(
    ("driver", "runs", "built", "state", "found", "fix"),
    [
        ("580.65.06", (13, 0), "13.0", "ok", "580.65.06, for CUDA up to 13.0", ""),
        ("580.65.06", (13, 0), "13.4", "ok", "580.65.06", ""),
        ("550.54.15", (12, 4), "13.0", "missing", "too old; torch is built for CUDA 13.0", "to 580 or newer"),
        ("580.65.06", (13, 0), None, "warning", "torch is built without CUDA", "pip install"),
        ("580.65.06", None, "13.0", "warning", "its library libcuda.so.1 is not visible", "docker run --gpus all"),
    ],
)
def test_the_driver_is_held_against_torchs_cuda(monkeypatch, driver, runs, built, state, found, fix):
    monkeypatch.setattr(checks, "driver_version", lambda: driver)
    monkeypatch.setattr(checks, "driver_cuda_version", lambda: runs)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert_found(checks.check_driver(), state, found, fix)


def test_gpus_of_a_kind_share_a_line(gpus):
    gpus(H100, H100, T4)
    expected = "2 x NVIDIA H100, 80 GiB, compute capability 9.0; 1 x Tesla T4, 16 GiB, compute capability 7.5"
    assert_found(checks.check_gpus(), "ok", expected)


def test_gpus_that_cannot_train_are_told(gpus, monkeypatch):
    gpus(H100, V100)
    assert_found(
        checks.check_gpus(), "missing", "GPU 1 (Tesla V100) has compute capability 7.0", "CUDA_VISIBLE_DEVICES"
    )
    gpus(H100, H100, free=0.25)
    assert_found(checks.check_gpus(), "warning", "GPU 1 has 20 GiB free", "nvidia-smi")
    gpus(H100, H100)
    monkeypatch.setattr(checks, "_computes", lambda index: index == 0)
    assert_found(checks.check_gpus(), "missing", "GPU 1 (NVIDIA H100) computes wrong results")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert_found(checks.check_gpus(), "missing", "torch cannot use any GPU", "CUDA_VISIBLE_DEVICES (now: 7)")


@pytest.mark.parametrize(("gpu", "instead"), [(True, "float16"), (False, "float32")])
def test_hardware_without_bfloat16_is_slower(monkeypatch, gpu, instead):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert_found(checks.check_bfloat16(), "warning", "not supported by", f"uses {instead}")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert_found(checks.check_bfloat16(), "ok", "supported by")


def test_several_gpus_need_nccl(gpus, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    gpus(H100)
    assert_found(checks.check_nccl(), "ok", "needed only with several GPUs")
    gpus(H100, H100)
    assert_found(checks.check_nccl(), "missing", "required for 2 GPUs")


@pytest.mark.parametrize(
    ("gpu", "engines", "container", "state", "found", "fix"),
    [
        (H100, 8, False, "ok", "8 engines in GPU 0 (reported by nvJPEG)", ""),
        (H100, 1, False, "ok", "1 engine in", ""),
        (
            H100,
            0,
            True,
            "warning",
            "not accessible in this container",
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video",
        ),
        (H100, 0, False, "warning", "not accessible, though this GPU model has one", "MIG"),
        (H100, None, False, "ok", "expected from the compute capability; nvJPEG gave no answer", ""),
        (T4, None, False, "ok", "unknown; nvJPEG gave no answer", ""),
        (T4, 0, True, "ok", "none in this GPU", ""),
    ],
)
def test_the_jpeg_decoder_is_asked_for_and_what_is_inferred_is_said_to_be(
    gpus, monkeypatch, gpu, engines, container, state, found, fix
):
    gpus(gpu)
    monkeypatch.setattr(checks, "jpeg_engines", lambda: engines)
    monkeypatch.setattr(checks, "in_container", lambda: container)
    assert_found(checks.check_jpeg_decoder(), state, found, fix)


@pytest.mark.parametrize(("created", "told", "engines"), [(0, 0, 8), (7, 0, 0), (6, 0, None), (0, 9, None)])
def test_nvjpeg_says_how_many_engines_there_are(gpus, monkeypatch, created, told, engines):
    closed: list[object] = []

    def create(backend, _device, _pinned, _flags, handle):
        handle._obj.value = 5
        return created if backend == 3 else 0

    def info(handle, count, _cores):
        assert handle.value == 5
        count._obj.value = 8
        return told

    library = types.SimpleNamespace(
        nvjpegCreateEx=create, nvjpegGetHardwareDecoderInfo=info, nvjpegDestroy=closed.append
    )
    gpus(H100)
    monkeypatch.setattr(checks, "_nvjpeg", lambda: library)
    assert checks.jpeg_engines() == engines
    assert len(closed) == (created == 0)


def test_nvjpeg_is_found_where_pip_puts_it():
    assert checks._nvjpeg().nvjpegGetHardwareDecoderInfo


def test_gpus_need_a_compiler_and_pythons_header(gpus, no_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(preflight, "has_compiler", lambda _: False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert_found(
        checks.check_compiler(), "ok", "no C compiler and no Python.h; needed only on GPUs: apt-get install gcc"
    )
    gpus(H100)
    assert_found(checks.check_compiler(), "missing", "no C compiler and no Python.h", "apt-get install gcc python3")
    monkeypatch.setattr(preflight, "has_compiler", lambda _: True)
    assert_found(checks.check_compiler(), "missing", "no Python.h")
    (tmp_path / "Python.h").touch()
    assert_found(checks.check_compiler(), "ok", "C compiler and Python.h")


@pytest.mark.parametrize(
    ("kind", "state", "found", "fix"),
    [
        (None, "ok", "not installed", ""),
        ("another package", "warning", "not NVIDIA's", "pip uninstall apex"),
        ("NVIDIA's, built without its CUDA kernels", "warning", "without its CUDA kernels", "--optimizer sgd"),
        ("NVIDIA's", "warning", "with its CUDA kernels is not installed", "--optimizer sgd"),
    ],
)
def test_an_apex_that_is_not_nvidias_or_does_not_load_is_told(monkeypatch, kind, state, found, fix):
    monkeypatch.setattr(checks, "apex_kind", lambda: kind)
    monkeypatch.setitem(sys.modules, "amp_C", None)
    assert_found(checks.check_apex(), state, found, fix)


# --- the machine


def test_the_loader_decodes_files_for_real():
    assert_found(checks.check_loader(), "ok", "decoded, cropped and warped on CPUs")


def test_a_loader_with_wrong_colours_is_told(no_gpu, monkeypatch):
    monkeypatch.setattr(checks, "_colours_seen", lambda *_: torch.zeros(4, 3))
    assert_found(checks.check_loader(), "missing", "differ by 200/255 on cpu", "nvidia-dali")


def test_a_cache_that_is_temporary_or_full_is_told(monkeypatch, tmp_path):
    assert_found(checks.check_cache(), "ok", "GiB free")
    monkeypatch.setattr(checks, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path.parent))
    assert_found(checks.check_cache(), "warning", "home folder is not writable", "XDG_CACHE_HOME")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "elsewhere")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(free=1 << 20))
    assert_found(checks.check_cache(), "warning", "0.0 GiB free", "XDG_CACHE_HOME")


def disk(*, total: int = 1 << 40, free: int = 1 << 40):
    return types.SimpleNamespace(total=total, free=free)


def test_cpus_that_are_withheld_are_told(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(checks, "usable_cpus", lambda: 8)
    assert_found(checks.check_cpus(), "warning", "8 of 64", "docker run --cpus")
    monkeypatch.setattr(checks, "usable_cpus", lambda: 64)
    assert_found(checks.check_cpus(), "ok", "64")


def test_memory_is_the_containers_where_there_is_a_limit(no_gpu, gpus, monkeypatch, tmp_path):
    limits = (tmp_path / "memory.max", tmp_path / "nowhere")
    monkeypatch.setattr(checks, "CGROUP_MEMORY", limits)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 64 << 18, "SC_PAGE_SIZE": 4096}.__getitem__)
    limits[0].write_text("max\n")
    assert_found(checks.check_memory(), "ok", "64.0 GiB")
    limits[0].write_text(f"{6 << 30}\n")
    assert_found(checks.check_memory(), "ok", "6.0 GiB, limit of a container (64 in all)")
    gpus(H100, H100)
    assert_found(checks.check_memory(), "warning", "6.0 GiB", "docker run --memory 16g")


@pytest.mark.parametrize(
    ("limits", "state", "fix"),
    [
        ((256, 4096), "warning", "ulimit -n 1024"),
        ((256, 512), "warning", "docker run --ulimit nofile="),
        ((256, resource.RLIM_INFINITY), "warning", "ulimit -n 1024"),
        ((1024, 4096), "ok", ""),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok", ""),
    ],
)
def test_few_open_files_are_told(monkeypatch, limits, state, fix):
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    assert_found(checks.check_descriptors(), state, "per process", fix)


def test_little_shared_memory_matters_to_several_gpus(no_gpu, gpus, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(total=64 << 20))
    assert_found(checks.check_shared_memory(), "ok", "64 MiB; several GPUs need more")
    gpus(H100, H100)
    assert_found(checks.check_shared_memory(), "warning", "64 MiB: may be too small for NCCL", "--ipc=host")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(total=8 << 30))
    assert_found(checks.check_shared_memory(), "ok", "8.0 GiB")
    monkeypatch.setattr(checks, "SHARED_MEMORY", tmp_path / "nowhere")
    assert_found(checks.check_shared_memory(), "warning", "does not exist", "--ipc=host")


# --- folders


def images_at(root: Path, classes: dict[str, tuple[str, ...]]) -> Path:
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(root / split / name / "0.png")
    return root


def test_a_folder_of_images_is_read(tmp_path):
    root = images_at(tmp_path, {"train": ("ant", "bee"), "val": ("ant", "bee")})
    assert_found(checks.check_data(str(root)), "ok", "2 classes; 2 files (mean 0 kB)")
    shutil.rmtree(root / "train" / "ant")
    (root / "train" / "ant").mkdir()
    (root / "train" / "bee" / "0.png").unlink()
    assert checks.check_data(str(root)).state == "missing"


@pytest.mark.parametrize(
    ("classes", "found"),
    [({"train": ("ant",), "val": ("bee",)}, "different classes"), ({"val": ("ant",)}, "no folder train/ in it")],
)
def test_a_folder_that_cannot_be_trained_on_is_told(tmp_path, classes, found):
    finding = checks.check_data(str(images_at(tmp_path, classes)))
    assert (finding.state, found in finding.found) == ("missing", True)


def test_files_are_not_read_longer_than_a_moment(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert checks._read_from_disk(1e12, tmp_path / "file") == 5
    assert checks._read_from_disk(0.0, tmp_path / "file") == 0
    assert checks._read_from_disk(1e12, tmp_path / "nowhere") == 0


def test_a_folder_for_results_must_be_writable(tmp_path, monkeypatch):
    assert_found(checks.check_out(str(tmp_path / "a" / "b")), "ok", f"{tmp_path} is writable")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    assert_found(checks.check_out(str(tmp_path / "file" / "b")), "missing", "file is a file", "choose a folder")
    assert_found(checks.check_out("/proc/run"), "missing", "/proc is not writable", "another folder")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk(free=1 << 20))
    assert_found(checks.check_out(str(tmp_path)), "warning", "0.0 GiB free", "free some space")


# --- the report


def raising(error: Exception) -> Check:
    def look() -> Finding:
        raise error

    return Check(look, needed=True)


def test_a_check_that_fails_is_a_line_of_the_report():
    broken = raising(RuntimeError("first\nsecond"))
    assert examine(broken) == Finding("missing", "the check failed: first")
    assert examine(broken._replace(needed=False)) == Finding("warning", "the check failed: first")
    assert examine(raising(ValueError())).found == "the check failed: ValueError"
    assert examine(broken, ["torch", "DALI"]) == Finding("warning", "not checked: torch and DALI cannot be imported")


FINE, WEAK, BAD = Finding("ok", "fine"), Finding("warning", "weak", "do this"), Finding("missing", "none", "do that")


@pytest.mark.parametrize(
    ("findings", "status", "last"),
    [
        ([FINE], 0, "training can run on this machine (no warnings)"),
        ([FINE, WEAK], 0, "training can run on this machine (1 warning)"),
        ([BAD, WEAK, WEAK], 1, "training cannot run on this machine: 1 missing, 2 warnings"),
    ],
)
def test_the_exit_status_says_whether_training_can_run(monkeypatch, capsys, findings, status, last):
    table = {f"check {n}": Check(partial(copy.copy, finding), needed=True) for n, finding in enumerate(findings)}
    monkeypatch.setattr(doctor, "CHECKS", table)
    with pytest.raises(SystemExit) as ended:
        commands.main(["doctor"])
    assert ended.value.code == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == last
    assert lines[0] == f"check 0       {findings[0].state:<9}{findings[0].found}"
    assert sum("-> do" in line for line in lines) == sum(bool(finding.fix) for finding in findings)


def test_the_findings_go_to_a_file_with_what_the_machine_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "CHECKS", {"one": Check(lambda: FINE, needed=True), "two": raising(OSError("gone"))})
    target = tmp_path / "new" / "doctor.json"
    with pytest.raises(SystemExit) as ended:
        commands.main(["doctor", "--json", str(target), "--out", str(tmp_path)])
    assert ended.value.code == 1
    assert f"written to {target}" in capsys.readouterr().out
    content = json.loads(target.read_text())
    assert content["able"] is False
    assert list(content["checks"]) == ["one", "two", "--out"]
    assert content["checks"]["two"] == {"state": "missing", "found": "the check failed: gone", "fix": ""}
    assert content["environment"]["versions"]["torch"]


@pytest.mark.parametrize("width", [80, 120])
def test_findings_are_wrapped_behind_their_names_and_lines_to_copy_are_not(width):
    fix = "docker run " + "--option " * 20
    first, *others = shown(Finding("warning", "word " * 60, fix), width).splitlines()
    assert first.startswith("warning  word")
    assert len(first) <= width - 14
    assert others[-1] == " " * 23 + "-> " + fix
    assert all(line.startswith(" " * 23 + "word") and len(line) <= width for line in others[:-1])


def run_broken(tmp_path: Path, *words: str, error: str) -> subprocess.CompletedProcess[str]:
    """Run a command in which importing torch, torchvision, numba or DALI raises an error."""
    for name in ("torch.py", "torchvision.py", "numba.py", "nvidia/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"raise {error}\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "COLUMNS": "100"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("error", ["ImportError('libthing.so: no such file')", "RuntimeError('wrong build')"])
def test_with_a_broken_installation_every_package_has_its_line(tmp_path, error):
    done = run_broken(tmp_path, str(ROOT / "launch.py"), "doctor", "--json", str(tmp_path / "d.json"), error=error)
    assert done.returncode == 1
    assert done.stderr == ""
    reason = error.split("'")[1]
    for name in ("torch", "torchvision", "numba", "DALI"):
        assert f"\n{name:<14}missing  import failed: {reason}\n" in done.stdout
    assert list(json.loads((tmp_path / "d.json").read_text())["checks"]) == list(doctor.CHECKS)
    assert "\nloader        warning  not checked: torch and torchvision and numba and DALI cannot be" in done.stdout
    assert done.stdout.splitlines()[-2].startswith("training cannot run on this machine: 4 missing, ")


def test_python_alone_is_enough_for_a_report():
    words = ["-S", "-m", "fast_spatial.tools.doctor"]  # no installed package is visible
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "torch is not installed" in done.stdout
    assert "\nmemory        ok" in done.stdout


def test_the_summary_counts():
    assert summary(Counter(ok=3)) == "training can run on this machine (no warnings)"
