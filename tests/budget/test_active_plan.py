"""Budgets from the command line: what is measured, planned, given to every task, and found again by a restart."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fast_spatial import commands, launcher, preflight
from fast_spatial.config.commands import CalibrateConfig
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.run_files import CALIBRATION, PLAN, USAGE
from fast_spatial.runtime.text import duration
from fast_spatial.training.pacing import TrainingDeadline
from tests.reporting.test_report import FakeLaunch

ROWS = ["nocrop", "standard", "random_30", "worst10_30"]
NOW_SEC = 10_000.0
REPRODUCE = ["reproduce", "--data", "digits", "--hours", "0.25"]
# Of 900 s: 12 s for every start and end, and an evaluation of 110 s at most.
MEASURED = {
    "views_per_sec": 3000.0,
    "images": 1497,
    "val_images": 300,
    "val_images_of_a_class": 22,
    "classes": 10,
    "gpus": 0,
    "busy_sec": 0.0,
}


class Tasks(FakeLaunch):
    """Stands for the tasks, and remembers the limit of each; one of them may break off, or fail."""

    def __init__(self, break_at: int = 0, fail: str = "") -> None:
        super().__init__(break_at)
        self.limits: list[tuple[str, Any]] = []
        self._fail = fail

    def __call__(self, task: str, config: Any, limit: Any = None) -> float:
        self.limits.append((task, limit))
        if task == "calibrate":
            assert isinstance(config, CalibrateConfig)
            rates = {"images_per_sec": {str(side): 400.0 for side in config.sides}, "validation_images_per_sec": 1000.0}
            found = {**MEASURED, "trainings": [rates] * len(config.trainings), "left_sec": limit - NOW_SEC}
            write_json(Path(config.json), found)
            return 2.0
        if self._fail and task == "train" and self._fail in config.out:
            raise SystemExit(1)
        return super().__call__(task, config, limit)

    @property
    def tasks(self) -> list[str]:
        return [task for task, _ in self.limits]


@pytest.fixture(autouse=True)
def cpu_machine(tmp_path, monkeypatch):
    """A start of launch.py in an empty folder, on a machine without a GPU, where nothing takes time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "gpu_count", lambda: 0)
    monkeypatch.setattr(time, "monotonic", lambda: NOW_SEC)
    monkeypatch.setattr(commands, "STARTED", NOW_SEC)


def run(monkeypatch: pytest.MonkeyPatch, tasks: Tasks, *words: str, out: Path = Path("runs")) -> int:
    monkeypatch.setattr(launcher, "launch", tasks)
    return commands.main([*words, "--out", str(out)])


def plan_of(out: Path = Path("runs")) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / PLAN).read_text())
    return found


def test_a_reproduction_is_measured_planned_and_kept_within_its_limits(monkeypatch, capsys):
    tasks = Tasks()
    assert run(monkeypatch, tasks, *REPRODUCE) == 0
    assert tasks.tasks == ["calibrate", *["train", "evaluate", "landscape"] * 4]
    end = commands.STARTED + 900
    deadlines = [limit for task, limit in tasks.limits if task == "train"]
    assert all(isinstance(limit, TrainingDeadline) and limit.step_sec == {32: 64 / 400} for limit in deadlines)
    assert all(commands.STARTED < limit < end for task, limit in tasks.limits if task in ("evaluate", "landscape"))
    # Nothing took time here, so every row could have more than the one before; the last one all that was left.
    assert deadlines[0].until < deadlines[1].until < deadlines[2].until < deadlines[3].until < end
    assert end - deadlines[3].until < 15
    said = capsys.readouterr().out
    assert said.index("expected finish") < said.index("[1/4] nocrop: training")
    assert "| nocrop              | digits_linear |" in said
    plan = plan_of()
    assert plan["begun"] and len({row["epochs"] for row in plan["rows"]}) == 1
    assert [row["train"]["recipe"] for row in plan["rows"]] == ["digits_linear"] * 4
    assert (Path("runs") / "report.html").is_file()
    assert "--hours 0.25" in (Path("runs") / "report.md").read_text()


def test_flags_of_linear_schedules_are_taken_with_a_budget(monkeypatch):
    assert run(monkeypatch, Tasks(), *REPRODUCE, "--rows", "standard", "--warmup-epochs", "2") == 0
    assert [row["train"]["warmup_epochs"] for row in plan_of()["rows"]] == [2.0]


def test_a_plan_alone_starts_nothing_and_uses_nothing(monkeypatch, capsys):
    tasks = Tasks()
    assert run(monkeypatch, tasks, *REPRODUCE, "--plan-only") == 0
    assert tasks.tasks == ["calibrate"]
    assert "expected finish" in capsys.readouterr().out
    assert sorted(path.name for path in Path("runs").iterdir()) == sorted([CALIBRATION, PLAN])
    # The budget may be another one when it is begun, and is planned for anew.
    again = Tasks()
    assert run(monkeypatch, again, "reproduce", "--data", "digits", "--hours", "1") == 0
    assert again.tasks[0] == "calibrate"
    assert plan_of()["budget"]["hours"] == 1.0


def test_a_restart_goes_on_with_the_plan_and_counts_on(monkeypatch, capsys):
    tasks = Tasks(break_at=4)  # while the second row is trained
    assert run(monkeypatch, tasks, *REPRODUCE) == 130
    (part,) = json.loads((Path("runs") / USAGE).read_text())["parts"]
    assert part["ended"]
    before = plan_of()["rows"]
    monkeypatch.setattr(commands, "STARTED", NOW_SEC - 400)
    again = Tasks()
    capsys.readouterr()
    assert run(monkeypatch, again, *REPRODUCE) == 0
    assert again.tasks == ["train", "evaluate", "landscape"] * 3
    assert [limit.until - commands.STARTED < 900 for task, limit in again.limits if task == "train"] == [True] * 3
    said = capsys.readouterr().out
    assert "[1/4] nocrop: already done" in said
    assert f"--hours 0.25: {duration(400 + part['seconds'])} used" in said
    assert plan_of()["rows"] == before


def test_a_damaged_plan_is_named(monkeypatch, capsys):
    for content in ("{", "[]", "{}"):
        Path("runs").mkdir(exist_ok=True)
        (Path("runs") / PLAN).write_text(content)
        assert run(monkeypatch, Tasks(), *REPRODUCE) == 2
        first, second = capsys.readouterr().err.splitlines()
        assert f"{Path('runs') / PLAN}: cannot be read (" in first and second == "name a new folder"


def test_a_restart_may_have_more_time_but_no_other_flags(monkeypatch, capsys):
    assert run(monkeypatch, Tasks(break_at=2), *REPRODUCE) == 130
    capsys.readouterr()
    assert run(monkeypatch, Tasks(), *REPRODUCE, "--lr", "0.01") == 2
    assert "contains a plan with different flags (lr: nothing saved, 0.01 given)" in capsys.readouterr().err
    monkeypatch.setattr(commands, "STARTED", NOW_SEC - 1000)
    assert run(monkeypatch, Tasks(), *REPRODUCE) == 2
    assert "--hours 0.25: the budget is used up (0.28 hours of running time)" in capsys.readouterr().err
    more = Tasks()
    assert run(monkeypatch, more, "reproduce", "--data", "digits", "--hours", "1") == 0
    assert "calibrate" not in more.tasks
    assert plan_of()["budget"]["asked"] == "--hours 1"


def test_a_restart_ends_at_the_time_that_the_first_start_resolved(monkeypatch):
    until = [*REPRODUCE[:3], "--until", "18:30"]
    assert run(monkeypatch, Tasks(break_at=2), *until) == 130
    plan = plan_of()
    moment = "2099-01-31T18:30:00+00:00"  # of another day than the next 18:30
    write_json(Path("runs") / PLAN, {**plan, "budget": {**plan["budget"], "moment": moment}})
    assert run(monkeypatch, Tasks(), *until) == 0
    assert plan_of()["budget"]["moment"] == moment


def test_a_row_that_fails_does_not_lose_the_others(monkeypatch, capsys):
    tasks = Tasks(fail="random_30")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tasks, *REPRODUCE)
    assert ended.value.code == 1
    assert tasks.tasks.count("evaluate") == 3
    assert [found["mode"] for found in json.loads(Path("runs/results.json").read_text())] == [
        "nocrop",
        "standard",
        "worst10",
    ]
    assert (
        "failed: random, 30 degrees; run the same command again to retry, with a larger budget"
        in capsys.readouterr().out
    )
    assert Path("runs/report.html").is_file()
    again = Tasks()
    assert run(monkeypatch, again, *REPRODUCE) == 0
    assert again.tasks == ["train", "evaluate", "landscape"]


def test_a_training_alone_gets_all_of_the_budget(monkeypatch):
    tasks = Tasks()
    assert run(monkeypatch, tasks, "train", "--data", "digits", "--mode", "worst10", "--hours", "0.1") == 0
    assert tasks.tasks == ["calibrate", "train"]
    deadline = tasks.limits[1][1]
    assert 350 < deadline.until - commands.STARTED < 360
    assert deadline.after_sec == pytest.approx(3.3)  # 300 images at 1000 a second, and the end
    assert plan_of()["rows"][0]["train"]["recipe"] == "digits_linear"


@pytest.mark.parametrize("flip", [[], ["--eval-every", "1"]])
def test_evaluations_between_epochs_are_as_often_as_was_asked(monkeypatch, flip):
    assert run(monkeypatch, Tasks(), "train", "--data", "digits", "--mode", "random", "--hours", "0.1", *flip) == 0
    assert plan_of()["rows"][0]["train"]["eval_every"] == len(flip) // 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--gpu-hours", "1"], "--gpu-hours 1: requires a GPU, and none is visible"),
        (["--hours", "1", "--nnodes", "2", "--rdzv-endpoint", "h:1"], "--nnodes 2: a budget requires one node"),
        (["--hours", "1", "--epochs", "3"], "--epochs conflicts with a budget"),
        (["--hours", "0"], "--hours 0: must be more than 0"),
        (["--until", "2020-01-01"], "--until 2020-01-01: this time is past"),
        (["--hours", "1", "--global-batch-size", "5000"], "--global-batch-size 5000: digits holds only 1497"),
    ],
)
@pytest.mark.parametrize("command", [["train", "--mode", "random"], ["reproduce"]])
def test_what_makes_no_sense_is_refused_before_anything_is_done(monkeypatch, capsys, command, words, error):
    tasks = Tasks()
    assert run(monkeypatch, tasks, *command, "--data", "digits", *words) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"launch.py: {error}")
    assert second
    assert tasks.tasks == []
    assert list(Path().iterdir()) == []


def test_a_recipe_with_milestones_fits_or_is_refused(monkeypatch, capsys):
    words = ["train", "--data", "digits", "--mode", "random", "--recipe", "digits"]
    assert run(monkeypatch, Tasks(), *words, "--hours", "0.008") == 2  # 8 epochs of 23 steps take 29 s, and a start 2
    assert "milestones are never rescaled" in capsys.readouterr().err
    tasks = Tasks()
    assert run(monkeypatch, tasks, *words, "--hours", "0.1", out=Path("other")) == 0
    assert plan_of(Path("other"))["rows"][0]["epochs"] == 8
    assert "stay unused" in capsys.readouterr().out
