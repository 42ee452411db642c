"""Training to a deadline: the timeline's algebra, decisions, and real runs on simulated clocks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from fast_spatial.config import recipes
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.models import checkpoint
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.training import control
from fast_spatial.training.pacing import NewEnd, Pacer, TrainingDeadline
from fast_spatial.training.run_folder import read_segments
from fast_spatial.training.schedule import Segment, Timeline, lr_at, mean_over_rest, side_at
from fast_spatial.training.step import TrainStep
from fast_spatial.training.train import train

ALONE = World(0, 0, 1, torch.device("cpu"))
STEPS_PER_EPOCH = 23


@pytest.fixture(autouse=True)
def _stand_down():
    yield
    distributed.stop()


def config_of(**flags: str) -> TrainConfig:
    return recipes.train_config(
        {"data": "digits", "mode": "random", "out": "out", "recipe": "digits_linear", "lr": "1.0", **flags}
    )


def test_a_timeline_without_a_budget_is_steps_over_all_steps():
    timeline = Timeline.of_steps(40)
    assert [timeline.progress(step) for step in (0, 10, 39, 40, 50)] == [0.0, 0.25, 0.975, 1.0, 1.0]


def test_segments_are_continuous_and_change_no_step_before_them():
    timeline = Timeline.of_steps(100)
    before = [timeline.progress(step) for step in range(31)]
    assert timeline.replan(30, 65) == Segment(30, 0.3, 65)
    assert [timeline.progress(step) for step in range(31)] == before
    assert timeline.progress(30) == 0.3
    assert timeline.progress(31) == pytest.approx(0.3 + 0.7 / 35)
    assert timeline.progress(65) == 1.0
    timeline.replan(40, 200)
    assert timeline.progress(40) == pytest.approx(0.3 + 0.7 * 10 / 35)
    assert timeline.progress(120) == pytest.approx(0.5 + 0.5 * 80 / 160)
    assert timeline.end == 200


def test_learning_rate_and_side_follow_the_timeline():
    config = config_of(start_size="16", warmup_epochs="2", epochs="8")
    timeline = Timeline.of_steps(80)
    timeline.replan(40, 50)  # half is done in 40 steps; the other half is to fit into 10
    assert [lr_at(config, timeline.progress(step), 0) for step in (0, 10, 20, 40, 45, 50)] == pytest.approx(
        [0.0, 0.5, 1.0, 2 / 3, 1 / 3, 0.0]
    )
    assert [side_at(config, timeline.progress(step)) for step in (0, 40, 44, 45, 49)] == [16, 16, 16, 32, 32]


def test_a_stop_ends_the_timeline_where_it_is():
    timeline = Timeline.of_steps(100)
    timeline.replan(50, 50)
    assert timeline.end == 50
    assert timeline.progress(49) == 0.49
    assert timeline.progress(50) == 1.0


def test_what_depends_on_the_side_is_averaged_over_the_rest():
    config = config_of(start_size="16")
    at_side = {16: 1.0, 32: 5.0}
    assert mean_over_rest(config, 0.0, at_side) == pytest.approx(0.75 * 1 + 0.25 * 5)
    assert mean_over_rest(config, 0.5, at_side) == pytest.approx((0.25 * 1 + 0.25 * 5) / 0.5)
    assert mean_over_rest(config, 0.8, at_side) == pytest.approx(5.0)
    assert mean_over_rest(config, 1.0, at_side) == 5.0


@dataclasses.dataclass
class Ended:
    """How a simulated training ended."""

    at_sec: float
    steps: int
    timeline: Timeline


def simulate(
    config: TrainConfig,
    deadline: TrainingDeadline,
    step_sec: Callable[[float, int], float],
    *,
    evaluation_sec: float = 0.0,
    between_sec: float = 0.0,
    after: Callable[[float], float] = lambda _: 0.0,
    lag: int = 0,
) -> Ended:
    """A training on a simulated clock; `step_sec` takes (time, side), `after` takes the time of the last step."""
    now = 0.0
    timeline = Timeline.of_steps(config.epochs * STEPS_PER_EPOCH)
    pacer = Pacer(deadline, config, timeline, STEPS_PER_EPOCH, clock=lambda: now)
    if config.schedule == "linear":
        timeline.replan(0, pacer.first_end(0))
    done, told = 0, list[NewEnd]()
    while done < timeline.end:
        if done and done % STEPS_PER_EPOCH == 0:
            now += between_sec
            if config.eval_every and (done // STEPS_PER_EPOCH) % config.eval_every == 0:
                now += evaluation_sec
                pacer.evaluated(evaluation_sec)
        side = side_at(config, timeline.progress(done))
        now += step_sec(now, side)
        done += 1
        told.append(pacer.after_step(done, side))
        heard = told[-1 - lag] if len(told) > lag else NewEnd()
        if heard.end and heard.start < timeline.end:
            timeline.replan(*heard)
    return Ended(now + after(now), done, timeline)


def lr_jumps(config: TrainConfig, timeline: Timeline) -> float:
    """The largest change of the learning rate from one step to the next."""
    lrs = [lr_at(config, timeline.progress(step), 0) for step in range(timeline.end + 1)]
    return max(abs(a - b) for a, b in itertools.pairwise(lrs))


SPEEDS = {
    "as expected": lambda now, side: 0.1,
    "twice as slow": lambda now, side: 0.2,
    "twice as fast": lambda now, side: 0.05,
    "slower from half-way on": lambda now, side: 0.1 if now < 60 else 0.3,
    "slow until half-way": lambda now, side: 0.3 if now < 60 else 0.1,
    "slow for a while": lambda now, side: 0.4 if 40 < now < 60 else 0.1,
    "slow for a while, late": lambda now, side: 0.4 if 90 < now < 100 else 0.1,
    "slower near the end": lambda now, side: 0.1 if now < 105 else 0.25,
    "a hiccup at the start": lambda now, side: 6.0 if 0.2 < now < 6 else 0.1,
    "a long first step": lambda now, side: 12.0 if not now else 0.1,
}


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("speed", SPEEDS)
def test_the_time_is_kept_whatever_the_speed(speed, lag):
    config = config_of()
    deadline = TrainingDeadline(until=120.0, after_sec=0.0, step_sec={32: 0.1}, evaluation_sec=0.0, interval_sec=1.2)
    ended = simulate(config, deadline, SPEEDS[speed], lag=lag)
    assert 118.5 <= ended.at_sec <= 121.0
    assert ended.timeline.progress(ended.steps) == 1.0
    assert lr_at(config, ended.timeline.progress(ended.steps - 1), 0) < 0.06
    assert lr_jumps(config, ended.timeline) < 0.2


def drawing() -> str:
    """A training of 120 s whose steps take three times as long from 60 s on: its planned end, as steps go by."""
    config = config_of()
    deadline = TrainingDeadline(until=120.0, after_sec=0.0, step_sec={32: 0.1}, evaluation_sec=0.0, interval_sec=1.2)
    ended = simulate(config, deadline, SPEEDS["slower from half-way on"])
    lines = ["| step | second | planned end | progress | learning rate |", "|---:|---:|---:|---:|---:|"]
    for step in (0, 300, 600, 610, 620, 640, 700, ended.steps):
        second = 0.1 * min(step, 600) + 0.3 * max(0, step - 600)
        end = next(segment.end for segment in reversed(ended.timeline.segments) if segment.start <= step)
        progress = ended.timeline.progress(step)
        lines.append(f"| {step} | {second:.0f} | {end} | {progress:.2f} | {lr_at(config, progress, 0):.2f} |")
    return "\n".join(lines)


def test_the_document_shows_what_the_pacer_does():
    text = (Path(__file__).parents[2] / "docs" / "budgets.md").read_text(encoding="utf-8")
    assert drawing() in text


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.5])
def test_time_for_what_comes_after_is_kept_at_other_speeds_and_the_learning_rate_is_down(factor):
    config = config_of()
    deadline = TrainingDeadline(until=300.0, after_sec=100.0, step_sec={32: 0.1}, evaluation_sec=0.0, interval_sec=3.0)
    ended = simulate(config, deadline, lambda now, side: factor * 0.1)
    assert ended.at_sec == pytest.approx(300 - max(1.0, factor) * 100, abs=6.0)
    assert ended.timeline.segments[-1].start < ended.timeline.end
    assert lr_at(config, ended.timeline.progress(ended.steps - 1), 0) < 0.02


@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
def test_larger_sides_that_are_to_come_are_reckoned_with(speed):
    config = config_of(start_size="16")
    deadline = TrainingDeadline(
        until=300.0, after_sec=0.0, step_sec={16: 0.1, 32: 0.4}, evaluation_sec=0.0, interval_sec=3.0
    )
    ended = simulate(config, deadline, lambda now, side: speed * (0.1 if side == 16 else 0.4))
    assert ended.at_sec == pytest.approx(300.0, abs=2.0)
    # Decisions are right from the start: they use the cost of the remaining sizes, not of the past ones.
    assert ended.steps == pytest.approx(300 / (speed * 0.175), rel=0.03)


def test_a_long_first_step_at_a_new_side_is_no_slow_down():
    config = config_of(start_size="16")
    deadline = TrainingDeadline(
        until=100.0, after_sec=0.0, step_sec={16: 0.1, 32: 0.4}, evaluation_sec=0.0, interval_sec=1.0
    )
    seen: set[int] = set()

    def step_sec(now: float, side: int) -> float:
        first = side not in seen
        seen.add(side)
        return (10.0 if first else 0.0) + (0.1 if side == 16 else 0.4)

    ended = simulate(config, deadline, step_sec)
    assert ended.at_sec == pytest.approx(100.0, abs=2.0)
    assert lr_jumps(config, ended.timeline) < 0.05


def test_evaluations_between_epochs_are_reckoned_with():
    config = config_of(eval_every="2")
    deadline = TrainingDeadline(until=200.0, after_sec=10.0, step_sec={32: 0.1}, evaluation_sec=10.0, interval_sec=2.0)
    ended = simulate(config, deadline, lambda now, side: 0.1, evaluation_sec=8.0, after=lambda _: 8.0)
    assert ended.at_sec == pytest.approx(200.0, abs=4.0)


def test_what_is_done_between_epochs_is_reckoned_with_from_the_start():
    config = config_of()
    deadline = TrainingDeadline(until=200.0, after_sec=0.0, step_sec={32: 0.1}, evaluation_sec=0.0, interval_sec=2.0)
    ended = simulate(config, deadline, lambda now, side: 0.1, between_sec=0.5)  # to save, say
    assert ended.at_sec == pytest.approx(200.0, abs=2.0)
    # 23 steps and the final work take 2.8 s; the length is known after some epochs, not only at the end.
    ends = [segment.end for segment in ended.timeline.segments if segment.progress > 0.2]
    assert max(ends) - min(ends) < 0.06 * 23 * 200 / 2.8


def test_what_comes_after_the_last_step_is_expected_to_be_slower_where_steps_were():
    config = config_of()
    deadline = TrainingDeadline(until=120.0, after_sec=20.0, step_sec={32: 0.1}, evaluation_sec=0.0, interval_sec=1.2)
    ended = simulate(config, deadline, lambda now, side: 0.2, after=lambda _: 40.0)
    assert ended.at_sec == pytest.approx(120.0, abs=2.0)


@pytest.mark.parametrize("lag", [0, 1])
def test_far_past_its_time_a_training_is_stopped_at_once(lag):
    config = config_of()
    deadline = TrainingDeadline(until=120.0, after_sec=20.0, step_sec={32: 0.1}, evaluation_sec=0.0, interval_sec=1.2)
    ended = simulate(config, deadline, lambda now, side: 0.1 if now < 99 else 4.0, lag=lag)
    assert ended.steps == ended.timeline.end
    assert ended.timeline.segments[-1].start == ended.timeline.segments[-1].end
    assert ended.at_sec < 120.0


def test_milestones_are_never_moved_only_stopped():
    config = config_of(recipe="digits", lr="0.02")
    deadline = TrainingDeadline(until=200.0, after_sec=0.0, step_sec={32: 0.1}, evaluation_sec=0.0, interval_sec=2.0)
    assert simulate(config, deadline, lambda now, side: 0.1).timeline.segments == [(0, 0.0, 8 * STEPS_PER_EPOCH)]
    stopped = simulate(config, deadline, lambda now, side: 2.0)
    assert stopped.at_sec == pytest.approx(204.0, abs=2.1)
    assert stopped.timeline.segments[0] == (0, 0.0, 8 * STEPS_PER_EPOCH)


def small(out: Path, **flags: str) -> TrainConfig:
    few = {"max_train_images": "128", "global_batch_size": "32", "eval_every": "0"}
    return config_of(out=str(out), lr="0.01", deterministic="true", **few, **flags)


# Seconds per step, by image size.
EXPECTED_SEC, TAKEN_SEC = {16: 0.08, 32: 0.12}, {16: 0.1, 32: 0.15}
# With 9 s: the final work is expected to be as much slower as the steps were, 1.25 s instead of 1 s.
LAST_STEP_SEC = pytest.approx(9.0 - 1.25, abs=2 * TAKEN_SEC[32])


class WorkClock:
    """A clock that only training steps advance, by `TAKEN_SEC`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now_sec = 0.0
        take_step = TrainStep.__call__

        def timed(step: TrainStep, batch: Batch) -> Any:
            self.now_sec += TAKEN_SEC[batch.side]
            return take_step(step, batch)

        patch.setattr(TrainStep, "__call__", timed)
        patch.setattr(control, "Pacer", functools.partial(Pacer, clock=lambda: self.now_sec))


def deadline_of(seconds: float) -> TrainingDeadline:
    return TrainingDeadline(
        until=seconds,
        after_sec=1.0,
        step_sec=EXPECTED_SEC,
        evaluation_sec=1.0,
        interval_sec=seconds / 100,
    )


def test_a_run_keeps_its_time_says_how_and_can_be_repeated_to_the_bit(tmp_path, monkeypatch):
    first = small(tmp_path / "first", start_size="16", dtype="float32")
    clock = WorkClock(monkeypatch)
    train(first, ALONE, deadline_of(9.0))
    assert clock.now_sec == LAST_STEP_SEC
    segments = read_segments(first.out)
    assert len(segments) > 2
    last = checkpoint.load(tmp_path / "first" / "last.pt")
    assert [Segment(*s) for s in last["segments"][1:]] == segments
    records = [json.loads(line) for line in (tmp_path / "first" / "log.jsonl").read_text().splitlines()]
    trained = [r for r in records if r["event"] == "train"]
    assert trained[-1]["epoch"] == pytest.approx(segments[-1].end / 4, abs=1e-3)
    assert trained[-1]["lr"] < 0.001  # 0 at the end

    again = dataclasses.replace(first, out=str(tmp_path / "again"), replay=first.out)
    train(again, ALONE)
    repeated = checkpoint.load(tmp_path / "again" / "last.pt")
    assert all(torch.equal(value, repeated["model"][name]) for name, value in last["model"].items())


def test_a_run_without_segments_cannot_be_replayed(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "train", "epoch": 1}\n')
    with pytest.raises(UserError, match="had no budget"):
        read_segments(str(tmp_path))
    with pytest.raises(UserError, match="cannot read"):
        read_segments(str(tmp_path / "nowhere"))


def rank_main(rank: int, port: int, out: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    world = distributed.start(stall_minutes=2)
    with pytest.MonkeyPatch.context() as patch:
        clock = WorkClock(patch)
        train(small(out / "paced", start_size="16", dtype="float32"), world, deadline_of(9.0))
    if rank == 0:  # which decides
        (out / "paced" / "ended").write_text(str(clock.now_sec))
    with pytest.MonkeyPatch.context() as patch:
        WorkClock(patch)
        # 1,600 steps, which cannot be cut, do not fit.
        train(small(out / "stopped", recipe="digits", epochs="400", dtype="float32"), world, deadline_of(6.0))
    distributed.stop()


def test_two_processes_decide_alike_and_judge_what_was_stopped(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(rank_main, (port, tmp_path), nprocs=2)
    assert float((tmp_path / "paced" / "ended").read_text()) == LAST_STEP_SEC
    for name in ("paced", "stopped"):
        segments = read_segments(str(tmp_path / name))
        records = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        evaluations = [r for r in records if r["event"] == "evaluation"]
        assert [r["epoch"] for r in evaluations] == [pytest.approx(segments[-1].end / 4, abs=1e-3)]
        assert (tmp_path / name / "best.pt").is_file()
        assert checkpoint.load(tmp_path / name / "last.pt")["steps"] == segments[-1].end
        stopped = [s for s in segments if s.start == s.end]
        assert len(segments) > 1 if name == "paced" else len(stopped) == 1
