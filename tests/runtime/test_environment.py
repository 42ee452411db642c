"""The environment of a result is recorded without failing or hanging."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fast_spatial.runtime import environment as about
from fast_spatial.runtime.environment import apex_kind, driver_version, environment, in_container

KEYS = [
    *("hardware", "cpu_flags", "memory_gib", "gpus", "cuda", "cudnn", "nccl", "driver", "host", "os", "container"),
    *("python", "versions", "apex", "commit", "dirty"),
]
PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:36:33 UTC 2025\nGCC 12.3"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (dvs-builder@U16)\nGCC 12.2"


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@e")
    done = subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with one commit, in place of this project."""
    if not shutil.which("git"):
        pytest.skip("no git")
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "one")
    monkeypatch.setattr(about, "ROOT", tmp_path)
    return tmp_path


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_it_is_json_of_known_keys_from_few_programs_that_may_not_hang(monkeypatch):
    run, asked = subprocess.run, []

    def counted(command, **options):
        asked.append((command[0], options.get("timeout")))
        return run(command, **options)

    with monkeypatch.context() as patch:
        patch.setattr(about, "subprocess", SimpleNamespace(run=counted, TimeoutExpired=subprocess.TimeoutExpired))
        found = environment()
    assert {limit for _, limit in asked} <= {about._TIMEOUT_SEC}
    assert len(asked) <= 3  # git twice, nvidia-smi where the driver's own file is missing
    assert list(found) == KEYS
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_module_imports_nothing_that_can_be_missing():
    code = (
        "import sys, fast_spatial.runtime.environment; print({'torch', 'numpy', 'numba', 'nvidia'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_gpus_are_named_and_counted(monkeypatch):
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA L4", "NVIDIA H100 80GB HBM3"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    found = environment()
    assert found["gpus"] == names
    assert found["hardware"].endswith(", 2 x NVIDIA H100 80GB HBM3, NVIDIA L4")


def test_without_torch_the_rest_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = environment()
    assert (found["gpus"], found["cuda"], found["nccl"]) == ([], None, None)
    assert found["python"]


@pytest.mark.parametrize(("text", "version"), [(PROPRIETARY, "580.65.06"), (OPEN, "570.124.06")])
def test_the_driver_says_its_version(tmp_path, monkeypatch, text, version):
    monkeypatch.setattr(about, "DRIVER_INFO", tmp_path / "version")
    (tmp_path / "version").write_text(text)
    assert driver_version() == version


@pytest.mark.parametrize(
    ("script", "version"),
    [("echo 581.15; echo 581.15", "581.15"), ("echo failed to talk to the driver", None), ("exit 9", None)],
)
def test_where_the_driver_says_nothing_its_tool_is_asked(tmp_path, monkeypatch, script, version):
    monkeypatch.setattr(about, "DRIVER_INFO", tmp_path / "nowhere")
    command(tmp_path, "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert driver_version() == version


def test_a_tool_that_hangs_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(about, "DRIVER_INFO", tmp_path / "nowhere")
    monkeypatch.setattr(about, "_TIMEOUT_SEC", 0.2)
    hangs = "import time; time.sleep(120); print('581.15')"
    command(tmp_path, "nvidia-smi", f'exec {sys.executable} -S -c "{hangs}"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert driver_version() is None


def test_the_commit_is_told_and_whether_its_files_were_changed(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    (checkout / "notes.txt").write_text("not a part of the commit\n")
    found = environment()
    assert (found["commit"], found["dirty"]) == (commit, False)
    (checkout / "code.py").write_text("x = 2\n")
    assert environment()["dirty"] is True


def test_without_a_checkout_a_variable_names_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(about, "ROOT", tmp_path)
    assert (environment()["commit"], environment()["dirty"]) == (None, None)
    monkeypatch.setenv("FAST_SPATIAL_COMMIT", "abc123")
    assert (environment()["commit"], environment()["dirty"]) == ("abc123", None)


def test_the_commit_of_a_project_that_this_is_installed_in_is_not_ours(checkout, monkeypatch):
    installed = checkout / "venv" / "site-packages"
    installed.mkdir(parents=True)
    monkeypatch.setattr(about, "ROOT", installed)
    assert environment()["commit"] is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout / "nothing"))
    assert (environment()["commit"], environment()["dirty"]) == (None, None)


def test_containers_are_told_by_their_marks(tmp_path, monkeypatch):
    for name in about.CONTAINER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(about, "CONTAINER_MARKS", (tmp_path / ".dockerenv",))
    assert not in_container()
    (tmp_path / ".dockerenv").touch()
    assert in_container()
    (tmp_path / ".dockerenv").unlink()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert in_container()


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ((), None),
        (("apex/__init__.py",), "another package"),
        (("apex/__init__.py", "apex/optimizers/fused_sgd.py"), "NVIDIA's, built without its CUDA kernels"),
        (("apex/__init__.py", "apex/optimizers/fused_sgd.py", "amp_C.py"), "NVIDIA's"),
    ],
)
def test_the_two_packages_named_apex_are_told_apart_without_running_them(tmp_path, monkeypatch, files, kind):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('it was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert apex_kind() == kind
