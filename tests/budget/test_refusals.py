"""Wrong flags are refused at once: in two lines, with exit status 2, before torch is imported or a file written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--data", "digits", "--mode", "random", "--out", "run"]
REPRODUCE = ["reproduce", "--data", "digits", "--out", "run"]
HOURS = ["--hours", "1"]
# A command line, and the beginning of the error.
CASES: list[tuple[list[str], str]] = [
    ([*TRAIN, "--hours", "3", "--epochs", "4"], "--epochs conflicts with a budget"),
    ([*TRAIN, *HOURS, "--lr", "-1"], "--lr -1: must be at least 0"),
    ([*TRAIN, *HOURS, "--recipe", "fats"], "--recipe fats: no such recipe or file"),
    ([*TRAIN, *HOURS, "--replay", "run"], "--replay conflicts with a budget"),
    ([*TRAIN, *HOURS, "--nnodes", "2"], "--nnodes 2: a budget requires one node"),
    ([*TRAIN, *HOURS, "--horus", "2"], "--horus: unknown flag"),
    ([*TRAIN, "--hours", "0"], "--hours 0: must be more than 0"),
    ([*TRAIN, "--hours", "soon"], "--hours soon: "),
    ([*TRAIN, "--until", "soon"], "--until soon: expected a time"),
    ([*TRAIN, "--until", "2020-01-01"], "--until 2020-01-01: this time is past"),
    ([*TRAIN, "--max-cost", "5"], "--max-cost 5: the price of a GPU-hour is unknown"),
    ([*TRAIN, "--plan-only"], "--plan-only: no budget to plan for"),
    ([*TRAIN, *HOURS, "--until", "18:30"], "--hours and --until exclude each other"),
    ([*REPRODUCE, *HOURS, "--epochs", "4"], "--epochs conflicts with a budget"),
    ([*REPRODUCE, *HOURS, "--lr", "-1"], "--lr -1: must be at least 0"),
    ([*REPRODUCE, *HOURS, "--recipe", "fats"], "--recipe fats: no such recipe or file"),
    ([*REPRODUCE, *HOURS, "--rows", "worst11"], "--rows worst11: choose a mode"),
    ([*REPRODUCE, *HOURS, "--rows", "random:400"], "--rows random:400: the degrees must lie"),
    ([*REPRODUCE, *HOURS, "--warmup-epochs", "99"], "--warmup-epochs 99: must be below"),
    ([*REPRODUCE, *HOURS, "--nnodes", "2"], "--nnodes 2: a budget requires one node"),
    ([*REPRODUCE, *HOURS, "--mode", "random"], "--mode: unknown flag"),
    ([*REPRODUCE, "--until", "25:00"], "--until 25:00: expected a time"),
    ([*REPRODUCE, "--until", "2020-01-01"], "--until 2020-01-01: this time is past"),
    ([*REPRODUCE, "--gpu-hours", "-1"], "--gpu-hours -1: must be more than 0"),
    ([*REPRODUCE, "--lr", "-1"], "--lr -1: must be at least 0"),
    ([*REPRODUCE, "--out", "begun", *HOURS], "--out: given twice"),
    (["reproduce", "--data", "digits", "--out", "begun", *HOURS, "--lr", "1"], "--out begun: contains a plan with"),
]
# Every command line in one process: exit status, lines of stderr, and what was imported.
CODE = """
import contextlib, io, json, sys
from fast_spatial import commands
found = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = commands.main(words)
    heavy = sorted({"torch", "numba", "numpy"} & set(sys.modules))
    found.append([status, said.getvalue().splitlines(), heavy])
print(json.dumps(found))
"""


def test_no_command_line_is_tried_twice():
    assert len({tuple(words) for words, _ in CASES}) == len(CASES)


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What the process said to each command line, and its folder."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "begun").mkdir()
    plan = {"flags": {}, "budget": {"asked": "--hours 1"}, "begun": True, "start_sec": 0.0, "text": "", "rows": []}
    (folder / "begun" / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-c", CODE, json.dumps([words for words, _ in CASES])]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)
    return json.loads(done.stdout), folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: " ".join(CASES[number][0]))
def test_wrong_flags_are_refused_before_torch_is_imported(refused, number):
    status, lines, imported = refused[0][number]
    assert lines[0].startswith(f"launch.py: {CASES[number][1]}")
    assert len(lines) == 2 and lines[1]
    assert (status, imported) == (2, [])


def test_nothing_was_written(refused):
    assert [str(path.relative_to(refused[1])) for path in refused[1].rglob("*")] == ["begun", "begun/plan.json"]
