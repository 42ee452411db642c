"""What may be spent, and the meter that counts what was."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fast_spatial.budget import usage as budget
from fast_spatial.budget.usage import UsageMeter, budget_of, moment_of
from fast_spatial.config.budget_policy import BudgetPolicy
from fast_spatial.config.train import BudgetOptions
from fast_spatial.errors import UserError
from fast_spatial.runtime.run_files import USAGE

HANG_SEC = 300.0
NOW = datetime.datetime(2030, 1, 31, 17, 0).astimezone()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18:30", "2030-01-31 18:30"),
        ("16:30", "2030-02-01 16:30"),  # today's is over
        ("2030-02-03T06:00", "2030-02-03 06:00"),
        ("2030-02-03", "2030-02-03 00:00"),
    ],
)
def test_a_time_of_the_clock_is_the_next_one(text, expected):
    assert moment_of(text, NOW) == datetime.datetime.fromisoformat(expected).astimezone()


def test_a_time_with_a_zone_is_taken_as_that():
    assert moment_of("2030-02-03T06:00+00:00", NOW).timestamp() == 1896328800
    in_the_east = datetime.datetime.fromisoformat("2030-02-01T05:00+09:00")
    assert moment_of("21:00+00:00", in_the_east) - in_the_east == datetime.timedelta(hours=1)


@pytest.mark.parametrize(
    ("text", "error"),
    [("2030-01-31T16:59", "this time is past"), ("tomorrow", "expected a time"), ("25:00", "expected a time")],
)
def test_other_times_are_refused(text, error):
    with pytest.raises(UserError, match=f"--until {text}: {error}"):
        moment_of(text, NOW)


@pytest.mark.parametrize(
    ("options", "gpus", "hours"),
    [
        ({"hours": 3.0}, 0, 3.0),
        ({"hours": 3.0}, 8, 3.0),
        ({"gpu_hours": 24.0}, 8, 3.0),
        ({"max_cost": 30.0, "price": 2.5}, 4, 3.0),
    ],
)
def test_gpu_hours_and_money_are_hours_of_all_gpus(options, gpus, hours):
    assert budget_of(BudgetOptions(**options), gpus).hours == hours


@pytest.mark.parametrize("options", [{"gpu_hours": 24.0}, {"max_cost": 30.0, "price": 2.5}])
def test_gpu_hours_need_gpus(options):
    with pytest.raises(UserError, match="none is visible\ngive --hours or --until instead"):
        budget_of(BudgetOptions(**options), 0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"hours": 1.0, "until": "18:00"}, "--hours and --until exclude each other"),
        ({"max_cost": 30.0}, "--max-cost 30: the price of a GPU-hour is unknown"),
        ({"hours": -1.0}, "--hours -1"),
        ({"hours": 0.0}, "--hours 0: must be more than 0"),
        ({"plan_only": True}, "--plan-only: no budget to plan for"),
    ],
)
def test_contradictions_are_refused(options, error):
    with pytest.raises(UserError, match=error):
        BudgetOptions(**options)


def parts(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / USAGE).read_text())["parts"]
    return found


class Hands:
    """This machine's two clocks, wound by hand: seconds of `time.monotonic()`, and the time of day."""

    def __init__(self) -> None:
        self.sec = 1000.0

    def monotonic(self) -> float:
        return self.sec

    def now(self, zone: datetime.tzinfo | None = None) -> datetime.datetime:
        return (NOW + datetime.timedelta(seconds=self.sec - 1000.0)).astimezone(zone)


@pytest.fixture
def hands(monkeypatch):
    hands = Hands()

    class Date(datetime.datetime):
        now = hands.now  # type: ignore[assignment]

    monkeypatch.setattr(budget, "time", hands)
    monkeypatch.setattr(budget, "datetime", SimpleNamespace(**{**vars(datetime), "datetime": Date}))
    return hands


def test_the_time_between_two_starts_does_not_count(tmp_path, hands):
    with UsageMeter(tmp_path, hands.sec - 100.0):
        pass
    hands.sec += 5.0
    with UsageMeter(tmp_path, hands.sec - 20.0) as usage:
        assert usage.used_sec == 120.0
        hours = budget_of(BudgetOptions(hours=0.1), 0)
        assert hours.until(usage) - hands.sec == pytest.approx(240.0)
        hands.sec += 7.0
        assert usage.used_sec == 127.0
        assert hours.until(usage) - hands.sec == pytest.approx(233.0)
    assert [(part["seconds"], part["ended"]) for part in parts(tmp_path)] == [(100, True), (27, True)]


def test_the_time_of_a_process_that_was_killed_counts(tmp_path):
    code = """
import pathlib, sys, time
from types import SimpleNamespace
from fast_spatial.budget import usage as budget
from fast_spatial.config.budget_policy import BudgetPolicy
now = [0.0]
budget.time = SimpleNamespace(monotonic=lambda: now[0])
with budget.UsageMeter(pathlib.Path(sys.argv[1]), -50.0, policy=BudgetPolicy(usage_interval_sec=0.02)):
    now[0] = 3.0
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    give_up = time.monotonic() + HANG_SEC
    try:
        while not (tmp_path / USAGE).is_file() or parts(tmp_path)[0]["seconds"] < 53.0:
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert parts(tmp_path)[0]["ended"] is False
    # What it was heard of last, and the longest that it may have gone on unheard.
    assert UsageMeter(tmp_path, time.monotonic()).used_before_sec == 53.0 + BudgetPolicy().usage_interval_sec


def test_another_time_of_the_clock_does_not_depend_on_use(tmp_path, hands):
    options = BudgetOptions(until="18:30")
    first = budget_of(options, 0)
    assert first.moment is not None
    known = first.moment - datetime.timedelta(days=1)
    again = budget_of(options, 0, known)  # a restart after midnight means the same time
    assert again.moment == known
    with UsageMeter(tmp_path, hands.sec - 1000.0) as usage:
        assert first.until(usage) - hands.sec == 5400.0  # it is 17:00
        hands.sec += 60.0
        assert first.until(usage) - hands.sec == 5340.0


def test_a_record_that_cannot_be_read_is_no_free_time(tmp_path):
    (tmp_path / USAGE).write_text("{")
    with pytest.raises(UserError, match="the used part of the budget is unknown\nname a new folder"):
        UsageMeter(tmp_path, time.monotonic())


def test_a_record_that_cannot_be_written_any_more_does_not_end_the_run(tmp_path, monkeypatch):
    with UsageMeter(tmp_path, time.monotonic(), policy=BudgetPolicy(usage_interval_sec=0.02)):
        tries = threading.Semaphore(0)

        def full(*_: object) -> None:
            tries.release()
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(budget, "write_json", full)
            assert all(tries.acquire(timeout=HANG_SEC) for _ in range(2))  # it goes on after the first
    assert parts(tmp_path)[0]["ended"] is True
