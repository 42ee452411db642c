"""The house has floors, and nobody reaches up: kernels, pipelines, fast_spatial, launch.py."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "pipelines", "fast_spatial", "launch")
# Imported by nobody but themselves.
APART = ("benchmarks", "tests")


def modules() -> dict[str, str]:
    """The project's modules: path from the root to source."""
    files = [path for package in (*FLOORS, *APART) for path in sorted((ROOT / package).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [ROOT / "launch.py", *files]}


def imports(source: str, path: str) -> Iterator[str]:
    """Dotted names of everything a module imports, anywhere in it."""
    package = list(Path(path).parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def upward(path: str, source: str) -> list[str]:
    """The imports of a module that go up, or to where nobody should."""
    home = Path(path).parts[0].removesuffix(".py")
    found = []
    for name in imports(source, path):
        target = name.split(".", maxsplit=1)[0]
        if target == home:
            continue
        if target in APART or (home in FLOORS and target in FLOORS[FLOORS.index(home) :]):
            found.append(f"{path} imports {name}")
    return found


def test_the_project_is_where_this_test_looks():
    found = modules()
    assert {"launch.py", "kernels/spatial.py", "pipelines/loader.py", "fast_spatial/train.py"} <= found.keys()
    assert "fast_spatial.cli.dispatch" in set(imports(found["launch.py"], "launch.py"))


@pytest.mark.parametrize("path", modules())
def test_no_module_imports_upwards(path):
    assert upward(path, modules()[path]) == []


@pytest.mark.parametrize(
    ("path", "source", "wrong"),
    [
        ("kernels/warp.py", "import pipelines.loader", True),
        ("kernels/warp.py", "def f():\n    from fast_spatial import config", True),
        ("kernels/warp.py", "from ..fast_spatial import config", True),
        ("pipelines/loader.py", "import importlib\nimportlib.import_module('fast_spatial.config')", True),
        ("fast_spatial/train.py", "import launch", True),
        ("fast_spatial/train.py", "from tests.test_cli import refused", True),
        ("launch.py", "import benchmarks.run", True),
        ("tests/test_cli.py", "import benchmarks.run", True),
        ("kernels/warp.py", "from kernels.spatial import grid", False),
        ("kernels/warp.py", "from . import spatial", False),
        ("pipelines/loader.py", "import kernels.sampling", False),
        ("launch.py", "from fast_spatial import config", False),
        ("tests/test_cli.py", "import launch", False),
        ("kernels/warp.py", "import numpy\nfrom pipelinesque import x", False),
    ],
)
def test_an_upward_import_would_be_found(path, source, wrong):
    assert bool(upward(path, source)) is wrong


def test_the_pipelines_know_no_networks_and_no_configuration():
    for path, source in modules().items():
        if path.startswith(("kernels/", "pipelines/")):
            names = [name for name in imports(source, path) if not name.startswith("torch.nn.functional")]
            assert [name for name in names if name.startswith(("torch.nn", "torchvision", "fire"))] == [], path


def test_what_options_need_imports_neither_torch_nor_numba():
    needed = "kernels, fast_spatial.config, fast_spatial.cli, fast_spatial.reproduce, launch"
    code = f"import sys, {needed}; print(sorted({{'torch', 'numba', 'numpy', 'nvidia', 'sklearn'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
