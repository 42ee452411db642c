"""The image: what its Dockerfile promises; and, without Docker, its pip, COPY and ENTRYPOINT lines carried out."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fast_spatial import commands
from fast_spatial.config.cli import read_flags
from fast_spatial.models import checkpoint
from fast_spatial.runtime.environment import COMMIT_VARIABLE

ROOT = Path(__file__).parents[2]
# A user whom no system knows.
STRANGER = 12345
# Every user may run it, as in the image.
PYTHON = "/usr/bin/python3"


class Stage(NamedTuple):
    """A FROM line's image and name, and the lines under it: (instruction, argument)."""

    image: str
    name: str
    lines: list[tuple[str, str]]

    def all(self, instruction: str) -> list[str]:
        return [argument for name, argument in self.lines if name == instruction]


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """The arguments before the first stage, and the stages."""
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, re.sub(r"\\\n\s*", "", code).splitlines()):
        instruction, _, argument = line.partition(" ")
        if instruction == "FROM":
            image, _, name = argument.partition(" AS ")
            stages.append(Stage(image, name, []))
        elif stages:
            stages[-1].lines.append((instruction, argument))
        else:
            assert instruction == "ARG"
            name, _, value = argument.partition("=")
            arguments[name] = value
    return arguments, stages


ARGUMENTS, STAGES = parse((ROOT / "Dockerfile").read_text(encoding="utf-8"))
CUDA, APEX, PACKAGES, FINAL = STAGES


def environment(stage: Stage) -> dict[str, str]:
    return dict(word.split("=", 1) for line in stage.all("ENV") for word in shlex.split(line))


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a file away: the last pattern that fits it, or a folder it lies in, decides."""
    parts = path.split("/")
    tops = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    verdict = False
    for pattern in patterns:
        shape = re.escape(pattern.removeprefix("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(shape, top) for top in tops):
            verdict = not pattern.startswith("!")
    return verdict


def context(root: Path) -> list[str]:
    """The files and links that `docker build` gets to see."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    files = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file() or path.is_symlink())
    return sorted(path for path in files if not ignored(path, patterns))


# --- what it promises


def test_every_base_is_pinned_and_the_argument_chooses_one():
    names = {stage.name for stage in STAGES}
    images = [stage.image for stage in STAGES if stage.image != "${BASE}"]
    assert len(images) == 2
    assert all(re.search(r":\d+\.\d+[\w.-]*$", image) for image in images)
    assert ARGUMENTS["BASE"] in names
    assert (CUDA.name, APEX.name) == ("cuda", "apex")


def test_the_base_has_the_cuda_of_torchs_wheels():
    installed = f"torch=={version('torch')}"
    if installed not in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        pytest.skip(f"the image does not install {installed}")
    tag = CUDA.image.partition(":")[2]
    assert tag.startswith(f"{torch.version.cuda}.")
    assert version("cuda-toolkit").startswith(tag.split("-")[0] + ".")


def test_the_last_stage_runs_as_nobody_in_particular():
    names = [name for name, _ in FINAL.lines]
    (user,) = FINAL.all("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # numbers: Kubernetes' runAsNonRoot reads no names
    assert names.index("USER") > max(k for k, name in enumerate(names) if name in ("RUN", "COPY"))


def test_the_last_stage_has_a_compiler_and_pythons_headers_and_nothing_more():
    (command,) = CUDA.all("RUN")
    install = command.split(" && ")[1]
    assert set(shlex.split(install)) - {"apt-get", "install", "--yes", "--no-install-recommends"} == {
        *("gcc", "libc6-dev", "libpython3-dev", "python3")
    }
    assert not any("apt-get" in line for line in FINAL.all("RUN"))


@pytest.mark.parametrize("command", [line for stage in STAGES for line in stage.all("RUN") if "apt-get" in line])
def test_a_layer_keeps_no_package_lists(command):
    assert command.startswith("apt-get update && apt-get install --yes --no-install-recommends ")
    assert command.endswith("&& rm -rf /var/lib/apt/lists/*")


def test_the_driver_brings_what_decodes_jpegs():
    assert set(environment(FINAL)["NVIDIA_DRIVER_CAPABILITIES"].split(",")) == {"compute", "utility", "video"}


def test_every_cache_lies_where_any_user_may_write():
    (made,) = FINAL.all("RUN")
    assert made.startswith("mkdir --mode=1777 /")
    folder = Path(made.split()[-1])
    settings = environment(FINAL)
    caches = {
        name: Path(settings[name]) for name in ("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    }
    assert [name for name, path in caches.items() if folder not in (path, *path.parents)] == []
    assert "NUMBA_CACHE_DIR" not in settings  # kernels/host.py would no longer name it after the kernels' sources


def test_what_follows_the_images_name_is_a_command_line():
    assert [json.loads(line) for line in FINAL.all("ENTRYPOINT")] == [["python3"]]
    assert FINAL.all("WORKDIR") == ["/opt/fast_spatial"]
    text = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
    found = re.findall(r"^docker run(?:\\\n|.)*", text, flags=re.MULTILINE)
    runs = [shlex.split(line.replace("\\\n", "")) for line in found]
    assert len(runs) >= 2
    for words in runs:
        program, command, *flags = words[words.index("fast_spatial") + 1 :]
        assert program == "launch.py"
        read_flags(flags, commands.COMMANDS[command].options)


def test_the_commit_can_be_told_without_making_a_layer_anew():
    assert FINAL.all("ARG") == [f'{COMMIT_VARIABLE}=""']
    assert environment(FINAL)[COMMIT_VARIABLE] == f"${COMMIT_VARIABLE}"
    names = [name for name, _ in FINAL.lines]
    assert names.index("ARG") > max(k for k, name in enumerate(names) if name in ("RUN", "COPY"))


def test_a_change_of_the_code_installs_no_package_anew():
    assert PACKAGES.all("COPY") == ["pyproject.toml requirements.txt ./"]
    assert FINAL.all("COPY") == ["--from=packages /opt/venv /opt/venv", "--chmod=755 . ."]


def test_the_context_holds_the_program_and_nothing_else(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    litter = [".git/HEAD", ".venv/bin/python", "runs/a/last.pt", "data/train/a/1.jpg", "kernels/__pycache__/warp.pyc"]
    for name in [*tracked, *litter]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (tmp_path / name).symlink_to((ROOT / name).readlink())
        else:
            (tmp_path / name).touch()
    packages = ("kernels/", "pipelines/", "fast_spatial/", "benchmarks/")
    files = ("LICENSE", "launch.py", "pyproject.toml", "requirements.txt")
    wanted = [name for name in tracked if name in files or name.startswith(packages)]
    assert context(tmp_path) == sorted(name for name in wanted if not name.startswith("benchmarks/results/"))
    assert len(wanted) > 40


@pytest.mark.parametrize(
    ("path", "patterns", "wrong"),
    [
        ("a/b.py", ["*", "!a"], False),
        ("a/b.py", ["*", "!b"], True),
        ("a/__pycache__/b.pyc", ["*", "!a", "**/__pycache__"], True),
        ("a/results/b.json", ["!a", "a/results"], True),
        ("a/c/b.json", ["a/results"], False),
    ],
)
def test_ignoring_is_read_as_docker_reads_it(path, patterns, wrong):
    assert ignored(path, patterns) is wrong


def test_an_images_own_torch_stays_and_the_rest_is_pinned(tmp_path):
    """The list that constrains pip, on what NVIDIA's image could hold."""
    (select,) = [part for line in PACKAGES.all("RUN") for part in line.split(" && ") if part.startswith("awk")]
    present = ["Pillow==11.0.0", "numpy==2.1.0", "scikit-learn==1.7.0", "torch==2.14.0a0+nv26.9", "triton==3.8.0"]
    (tmp_path / "present.txt").write_text("\n".join(present) + "\n")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    subprocess.run(select, shell=True, cwd=tmp_path, check=True)
    chosen = (tmp_path / "constraints.txt").read_text().split()
    pins = (ROOT / "requirements.txt").read_text().split()
    its_own = ("pillow", "numpy", "scikit-learn", "torch")
    assert chosen == [present[1], *present[3:], *(pin for pin in pins if pin.split("==")[0] not in its_own)]
    assert any(pin.startswith("torchvision==") for pin in chosen)


# --- its lines, carried out


class Image:
    """A folder in an image's place: the Dockerfile's paths are looked for in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (self.workdir,) = (self.mapped(line) for line in FINAL.all("WORKDIR"))
        (entrypoint,) = FINAL.all("ENTRYPOINT")
        self.entrypoint: list[str] = json.loads(entrypoint)
        self.environment = {name: self.mapped(value) for name, value in environment(FINAL).items()}
        self.environment["PATH"] = self.environment["PATH"].replace("$PATH", "/usr/bin:/bin")

    def mapped(self, text: str) -> str:
        """The text with the image's folders as this machine's."""
        return re.sub(r"(?<![\w.$])/(opt|cache|tmp)\b", rf"{self.root}/\1", text)

    def build(self) -> None:
        """The packages' lines, then the last stage's."""
        for stage in (PACKAGES, FINAL):
            folder = self.root
            for name, argument in stage.lines:
                if name == "WORKDIR":
                    folder = Path(self.mapped(argument))
                    folder.mkdir(parents=True)
                elif name == "COPY" and "--from" not in argument:
                    *sources, _ = [word for word in argument.split() if not word.startswith("--")]
                    for path in context(ROOT):
                        if "." in sources or path in sources:
                            (folder / path).parent.mkdir(parents=True, exist_ok=True)
                            shutil.copy(ROOT / path, folder / path, follow_symlinks=False)
                elif name == "RUN" and "apt-get" not in argument:
                    # CUDA's base has no packages for Python; this machine may.
                    command = re.sub(r"^--mount=\S+\s+|--system-site-packages ", "", argument)
                    command = self.mapped(command).replace("python3 -", f"{PYTHON} -")
                    subprocess.run(["bash", "-euc", command], cwd=folder, check=True)

    def run(self, *words: str) -> subprocess.Popen[str]:
        """`docker run --user STRANGER IMAGE words`; as this user, where it is not root."""
        program = shutil.which(self.entrypoint[0], path=self.environment["PATH"])
        assert program
        user: dict[str, Any] = {"user": STRANGER, "group": STRANGER, "extra_groups": []} if os.getuid() == 0 else {}
        return subprocess.Popen(
            [program, *self.entrypoint[1:], *words],
            cwd=self.workdir,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **user,
        )


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """Built once; everybody may enter it, unlike pytest's own folders. Downloads 6 GB where pip has not kept them."""
    root = Path(tempfile.mkdtemp(prefix="image-"))
    root.chmod(0o755)
    umask = os.umask(0o022)
    try:
        built = Image(root)
        built.build()
        yield built
    finally:
        os.umask(umask)
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def runs(image: Image) -> Iterator[Path]:
    """What `-v /runs:/runs` mounts: the user's own folder."""
    folder = Path(tempfile.mkdtemp(prefix="runs-"))
    if os.getuid() == 0:
        os.chown(folder, STRANGER, STRANGER)
    yield folder
    shutil.rmtree(folder)


def finished(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_the_packages_are_the_pinned_ones_and_no_tools_for_tests(image):
    code = "from importlib.metadata import distributions as d\nfor p in d(): print(f'{p.name}=={p.version}'.lower())"
    installed = set(finished(image.run("-c", code)).split())
    names = {line.split("==")[0] for line in installed}
    pins = set((ROOT / "requirements.txt").read_text().split())
    needed = {pin for pin in pins if pin.split("==")[0] in names}
    assert needed - installed == set()
    assert {pin.split("==")[0] for pin in pins - needed} >= {"pytest", "mypy", "ruff", "opencv-python-headless"}
    assert "pip" not in names
    assert {"torch", "torchvision", "nvidia-dali-cuda130", "numba", "fire"} <= names


@pytest.mark.slow
def test_a_stranger_is_told_that_training_can_run_here(image, runs):
    said = finished(image.run("launch.py", "doctor", "--out", str(runs), "--json", str(runs / "doctor.json")))
    assert "training can run on this machine" in said
    found = json.loads((runs / "doctor.json").read_text())["checks"]
    assert found["cache"]["state"] == "ok"
    assert image.mapped("/cache/fast_spatial") in found["cache"]["found"]


SMALL = {
    **{"data": "digits", "mode": "worst10", "views": 2, "max-train-images": 256, "global-batch-size": 16},
    **{"epochs": 4, "milestones": 1, "eval-every": 0},
}


@pytest.mark.slow
def test_a_stranger_trains_and_stops_and_goes_on_as_written(image, runs):
    flags = {**SMALL, "out": runs / "digits"}
    command = ["launch.py", "train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    run = image.run(*command)
    log = runs / "digits" / "log.jsonl"
    deadline = time.monotonic() + 900
    while not (log.is_file() and log.stat().st_size):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)  # docker stop
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 128 + signal.SIGTERM, said
    saved = checkpoint.load(runs / "digits" / "last.pt")
    assert 1 <= saved["epoch"] < 4
    finished(image.run(*command))
    assert checkpoint.load(runs / "digits" / "last.pt")["epoch"] == 4
    kept = Path(image.mapped("/cache/fast_spatial"))
    assert any(kept.glob("numba-*/**/*.nbc"))


@pytest.mark.slow
def test_a_stranger_compiles(image):
    """torch.compile asks for the user's name, and where to keep what it made."""
    code = "import torch\nprint(torch.compile(lambda x: x.sin() + 1)(torch.zeros(9)).sum().item())"
    if shutil.which("g++", path=image.environment["PATH"]) is None:
        pytest.skip("on CPUs, torch.compile needs g++, which the image leaves away")
    assert finished(image.run("-c", code)).split()[-1] == "9.0"
    assert any(Path(image.mapped("/cache/inductor")).iterdir())
