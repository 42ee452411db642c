"""The rooms of the project have an order: imports go down, and never in a circle."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.rooms import APART, FRONT, LEVEL, ROOT, cycle, imports, is_upward, modules, room_of, with_drawing

MOST_MODULES = 14
SOURCES = modules()


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
        ("fast_spatial.reporting.runs", "from fast_spatial.training.checkpoints import find_latest", True),
        ("fast_spatial.budget.usage", "from fast_spatial import reproduce", True),
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
    planted = {**SOURCES, "fast_spatial.budget.usage": where.format("from fast_spatial.budget import active_plan")}
    found = cycle(planted)
    assert found[0] == found[-1] and {"fast_spatial.budget.usage", "fast_spatial.budget.active_plan"} <= {*found}


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


def test_what_options_and_plans_need_imports_neither_torch_nor_numba():
    needed = "fast_spatial.kernels, fast_spatial.config.recipes, fast_spatial.config.cli, fast_spatial.commands, launch"
    needed += ", fast_spatial.config.budget_policy, fast_spatial.budget.planning, fast_spatial.budget.active_plan"
    code = f"import sys, {needed}; print(sorted({{'torch', 'numba', 'numpy', 'nvidia', 'sklearn'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_drawing_of_the_rooms_is_todays():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert "<!-- rooms -->" in text
    assert with_drawing(text, SOURCES) == text, "run python -m tests.helpers.rooms"


def test_no_mark_of_the_drawing_lies_left_of_the_diagonal():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = [line.split() for line in text[text.index("<!-- rooms -->") :].split("```")[1].splitlines()[2:]]
    assert rows[0][0] == "launch" and len(rows) == len(LEVEL)
    for number, row in enumerate(rows):
        assert row[1 + number] == "╲" and "■" not in row[1 : 1 + number]
