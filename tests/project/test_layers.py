"""The rooms of the project have an order: imports go down, and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the bottom to the top: a room may import those on earlier lines. Rooms on one line do not know each other.
ORDER = (
    ("errors",),
    ("kernels",),
    ("pipelines",),
    ("config", "runtime"),
    ("data", "models"),
    ("evaluation",),
    ("training", "reporting"),
    ("preflight",),
    ("worker",),
    ("launcher", "tools"),
    ("budget",),
    ("reproduce",),
    ("commands",),
    ("launch",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# Imported by nobody but themselves.
APART = ("benchmarks", "tests")
# The package itself: the Python API, imported when it is asked for.
FRONT = "fast_spatial"
MOST_MODULES = 14


def name_of(path: Path) -> str:
    """The dotted name of a module by its path from the root; kernels/ and pipelines/ are in the package by a link."""
    parts = path.with_suffix("").parts
    dotted = ".".join((FRONT, *parts) if parts[0] in ("kernels", "pipelines") else parts)
    return dotted.removesuffix(".__init__")


def modules() -> dict[str, str]:
    """The project's modules: dotted name to source."""
    folders = ("kernels", "pipelines", FRONT, *APART)
    # `rglob` does not follow the links in the package, so nothing is found twice.
    paths = [ROOT / "launch.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]
    return {name_of(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


SOURCES = modules()


def imports(name: str, source: str, known: Iterable[str]) -> Iterator[str]:
    """Dotted names of all that a module imports, anywhere in it: in functions and for type checkers, too."""
    known = set(known)
    # What a relative import starts from: of a package, the package itself.
    inside = any(other.startswith(f"{name}.") for other in known)
    package = name.split(".") if inside else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield full if full in known else ".".join(base)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def room_of(name: str) -> str:
    """The room of a module: the first part of its name in the package, or outside of it."""
    first, *rest = name.split(".")
    return rest[0] if first == FRONT and rest else first


def is_upward(importer: str, imported: str) -> bool:
    """Whether an import goes up, sideways, or to where nobody should."""
    home, target = room_of(importer), room_of(imported)
    if home == target or importer == FRONT:
        return False
    if target in APART or (target == FRONT and home in LEVEL):
        return True
    if imported.split(".", maxsplit=1)[0] in (
        "kernels",
        "pipelines",
    ):  # there is no such package: it is fast_spatial.kernels
        return True
    return home in LEVEL and target in LEVEL and LEVEL[target] >= LEVEL[home]


def cycle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle; [] if none do."""
    # All import the package, which imports nothing of them until it is asked.
    graph = {
        name: sorted({*imports(name, text, sources)} & sources.keys() - {name, FRONT})
        for name, text in sources.items()
        if name != FRONT
    }
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next(filter(None, (visit(below, [*path, name]) for below in graph[name])), [])
        done.add(name)
        return found

    return next(filter(None, (visit(name, []) for name in graph)), [])


def test_the_project_is_where_this_test_looks():
    assert {"launch", "fast_spatial.kernels.spatial", "fast_spatial.training.train"} <= SOURCES.keys()
    assert "fast_spatial.pipelines.inspection.probe" in SOURCES
    rooms = {room_of(name) for name in SOURCES if name != FRONT}
    assert rooms == {*LEVEL, *APART}


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_imports_upwards(name):
    assert [found for found in imports(name, SOURCES[name], SOURCES) if is_upward(name, found)] == []


def test_no_modules_import_each_other():
    assert cycle(SOURCES) == []


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("fast_spatial.kernels.warp", "import fast_spatial.pipelines.loader", True),
        ("fast_spatial.kernels.warp", "def f():\n    from fast_spatial.config import fields", True),
        ("fast_spatial.kernels.warp", "from ..config import fields", True),
        ("fast_spatial.config.train", "from fast_spatial.runtime import distributed", True),
        ("fast_spatial.runtime.device", "import importlib\nimportlib.import_module('fast_spatial.config.train')", True),
        ("fast_spatial.evaluation.attack", "if TYPE_CHECKING:\n    from fast_spatial.training.step import Step", True),
        ("fast_spatial.reporting.runs", "from fast_spatial.training.run_folder import find_latest", True),
        ("fast_spatial.budget.clock", "from fast_spatial import reproduce", True),
        ("fast_spatial.training.train", "import launch", True),
        ("fast_spatial.training.train", "from fast_spatial import evaluate", True),
        ("fast_spatial.training.train", "from kernels.warp import warp", True),
        ("fast_spatial.training.train", "from tests.config.test_cli import refused", True),
        ("launch", "import benchmarks.bench", True),
        ("tests.config.test_cli", "import benchmarks.bench", True),
        ("fast_spatial.kernels.warp", "from fast_spatial.kernels.spatial import grid", False),
        ("fast_spatial.kernels.warp", "from . import spatial", False),
        ("fast_spatial.pipelines.loader", "import fast_spatial.kernels.sampling", False),
        ("fast_spatial.commands", "from fast_spatial import preflight", False),
        ("launch", "from fast_spatial.commands import main", False),
        ("tests.config.test_cli", "import launch\nfrom fast_spatial import evaluate", False),
        ("fast_spatial.kernels.warp", "import numpy\nfrom pipelinesque import x", False),
    ],
)
def test_an_upward_import_would_be_found(name, source, wrong):
    assert any(is_upward(name, found) for found in imports(name, source, SOURCES)) is wrong


@pytest.mark.parametrize("where", ["{}", "def f():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_a_circle_would_be_found(where):
    planted = {**SOURCES, "fast_spatial.budget.clock": where.format("from fast_spatial.budget import spending")}
    found = cycle(planted)
    assert found[0] == found[-1] and {"fast_spatial.budget.clock", "fast_spatial.budget.spending"} <= {*found}


def test_no_folder_holds_more_modules_than_a_reader_can_take_in():
    counts: dict[str, int] = {}
    for path in ROOT.rglob("*.py"):
        folder = str(path.relative_to(ROOT).parent)
        if folder.split("/", maxsplit=1)[0] in ("kernels", "pipelines", FRONT, *APART):
            counts[folder] = counts.get(folder, 0) + 1
    assert {folder: count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_the_pipelines_know_no_networks_and_no_configuration():
    for name, source in SOURCES.items():
        if room_of(name) in ("kernels", "pipelines"):
            found = [other for other in imports(name, source, SOURCES) if other != "torch.nn.functional"]
            assert [other for other in found if other.startswith(("torch.nn", "torchvision", "fire"))] == [], name


def test_what_options_need_imports_neither_torch_nor_numba():
    needed = "fast_spatial.kernels, fast_spatial.config.recipes, fast_spatial.config.cli, fast_spatial.commands, launch"
    code = f"import sys, {needed}; print(sorted({{'torch', 'numba', 'numpy', 'nvidia', 'sklearn'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
