"""Runs that are stopped, killed or damaged resume to bit-identical weights and logs, or name the reason."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_spatial.config import recipes
from fast_spatial.config.commands import EvaluateConfig
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.evaluation.evaluate import evaluate_checkpoint
from fast_spatial.models import checkpoint
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import StepAgreement, World
from fast_spatial.runtime.files import write_atomically
from fast_spatial.runtime.run_files import BEST, LAST, PREVIOUS
from fast_spatial.runtime.runlog import RunLog
from fast_spatial.runtime.signals import SIGNALS, Stopped, stop_requests
from fast_spatial.training.checkpoints import Saver, find_latest
from fast_spatial.training.control import CheckpointTimer
from fast_spatial.training.step import TrainStep
from fast_spatial.training.train import train

ROOT = Path(__file__).parents[2]
ALONE = World(0, 0, 1, torch.device("cpu"))
STEPS_PER_EPOCH, EVALUATION_BATCHES = 4, 19
TIMINGS = {"elapsed_sec", "gpu_hours", "images_per_sec", "data_wait_pct", "cost_pct"}


class Crash(Exception):
    """Like SIGKILL: no handler catches it, and nothing is saved."""


@pytest.fixture(autouse=True)
def _stand_down():
    yield
    distributed.stop()
    torch.use_deterministic_algorithms(False)


def config_of(out: Path, **flags: str) -> TrainConfig:
    """Two epochs of four steps, each evaluated."""
    small = {"epochs": "2", "max_train_images": "64", "global_batch_size": "16", "views": "2", "milestones": "1"}
    raw = {"data": "digits", "mode": "worst10", "out": str(out), "eval_every": "1"}
    raw["deterministic"] = "true"
    return recipes.train_config({**raw, **small, **flags})


def run(out: Path, **flags: str) -> None:
    train(config_of(out, **flags), ALONE)


def interrupted(monkeypatch: pytest.MonkeyPatch, out: Path, after: int, how: Any, **flags: str) -> None:
    """A run that gets a signal, or crashes, after `after` steps and evaluation batches."""
    count = 0

    def progress(_: float) -> None:
        nonlocal count
        count += 1
        if count == after:
            if isinstance(how, signal.Signals):
                os.kill(os.getpid(), how)
            else:
                raise how

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "reset_watchdog", progress)
        with pytest.raises(Stopped if isinstance(how, signal.Signals) else type(how)) as ended:
            run(out, **flags)
    if isinstance(how, signal.Signals):
        assert ended.value.code == 128 + how


def numbers(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The numbers that two runs must share: the last checkpoint, and the log without its timings."""
    saved = checkpoint.load(out / LAST)
    for name in ("elapsed_sec", "log_size", "config"):
        del saved[name]
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return saved, [{name: value for name, value in r.items() if name not in TIMINGS} for r in records]


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal(one[name], other[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other):
            assert_equal(first, second)
    else:
        assert one == other


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    run(out)
    distributed.stop()
    return out


EPOCH = STEPS_PER_EPOCH + EVALUATION_BATCHES + 1


@pytest.mark.parametrize(
    ("after", "position"),
    [
        (1, (0, 1)),
        (STEPS_PER_EPOCH - 1, (0, STEPS_PER_EPOCH - 1)),
        (STEPS_PER_EPOCH, (0, STEPS_PER_EPOCH)),
        (STEPS_PER_EPOCH + 3, (0, STEPS_PER_EPOCH)),
        (EPOCH + 2, (1, 2)),
    ],
    ids=["first step", "mid-epoch", "last step of an epoch", "evaluation", "second epoch"],
)
def test_a_stopped_run_is_saved_where_it_was_and_continues_to_the_bit(whole, tmp_path, monkeypatch, after, position):
    interrupted(monkeypatch, tmp_path, after, signal.SIGTERM)
    saved = checkpoint.load(tmp_path / LAST)
    assert (saved["epoch"], saved["step"]) == position
    run(tmp_path)
    assert_equal(numbers(tmp_path), numbers(whole))


@pytest.mark.parametrize("how", [signal.SIGTERM, Crash()], ids=["stopped", "crashed"])
def test_a_run_that_ends_within_an_epoch_keeps_its_record_if_interrupted_in_the_last_step(tmp_path, monkeypatch, how):
    budget = tmp_path / "budget"
    budget.mkdir()
    (budget / "log.jsonl").write_text('{"event": "segment", "start": 0, "progress": 0.0, "end": 6}\n')
    flags = {"recipe": "digits_linear", "eval_every": "0", "checkpoint_every": "1", "replay": str(budget)}
    run(tmp_path / "whole", **flags)
    distributed.stop()
    interrupted(monkeypatch, tmp_path / "parts", STEPS_PER_EPOCH + 1 + 2, how, **flags)
    run(tmp_path / "parts", **flags)
    found = numbers(tmp_path / "parts")
    assert_equal(found, numbers(tmp_path / "whole"))
    assert [record["epoch"] for record in found[1] if record["event"] == "train"] == [1.0, 1.5]


def test_what_a_network_draws_itself_is_a_function_of_the_position(tmp_path, monkeypatch):
    """SqueezeNet has dropout."""
    network = {"arch": "squeezenet1_1", "epochs": "1", "mode": "random", "eval_every": "0"}
    run(tmp_path / "whole", **network)
    distributed.stop()
    interrupted(monkeypatch, tmp_path / "parts", 2, signal.SIGTERM, **network)
    run(tmp_path / "parts", **network)
    assert_equal(numbers(tmp_path / "parts"), numbers(tmp_path / "whole"))


# Every option that has a state of its own, or depends on the progress of the training.
EVERYTHING = {
    **{"recipe": "digits_linear", "warmup_epochs": "0.5", "lr": "0.02", "start_size": "16", "label_smoothing": "0.1"},
    **{"ema": "0.8", "blurpool": "true", "eval_size": "48", "eval_flip": "true", "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """An uninterrupted run with every option of the recipes."""
    out = tmp_path_factory.mktemp("everything")
    run(out, **EVERYTHING)
    distributed.stop()
    return out


# Six of eight steps are 75 %: the full image size begins at the third step of the second epoch.
@pytest.mark.parametrize("after", [STEPS_PER_EPOCH - 1, EPOCH + 1, EPOCH + 3], ids=["first", "before", "after"])
def test_a_run_with_everything_on_continues_to_the_bit(everything, tmp_path, monkeypatch, after):
    interrupted(monkeypatch, tmp_path, after, signal.SIGTERM, **EVERYTHING)
    run(tmp_path, **EVERYTHING)
    assert_equal(numbers(tmp_path), numbers(everything))


def test_the_averaged_weights_are_what_is_judged_and_saved_as_the_model(everything):
    saved, records = numbers(everything)
    moved = {name for name, value in saved["model"].items() if not torch.equal(value, saved["trained"][name])}
    assert {"conv1.weight", "bn1.running_mean", "fc.bias"} <= moved
    lrs = [record["lr"] for record in records if record["event"] == "train"]
    assert lrs == pytest.approx([0.02 * 5 / 6, 0.02 * 1 / 6])  # of each epoch's last step, after 3 and 7 of 8
    best = checkpoint.load(everything / BEST)
    weights = checkpoint.read_weights(everything / BEST)
    assert (weights.side, weights.blurpool) == (48, True)
    assert torch.equal(weights.state["fc.bias"], best["model"]["fc.bias"])
    evaluation = next(r for r in records if r["event"] == "evaluation" and r["epoch"] == best["epoch"])
    summary = judged(everything / BEST, flip=True)
    assert summary["natural_top1_pct"] == pytest.approx(evaluation["top1_pct"], abs=1.0)
    assert summary["deviations"] == ["logits averaged over every view and its mirror image", "a network with BlurPool"]
    assert judged(everything / BEST)["deviations"] == ["a network with BlurPool"]


def judged(path: Path, **options: Any) -> dict[str, Any]:
    """The summary of an evaluation without the grid."""
    report = path.parent / "evaluation.json"
    config = EvaluateConfig(checkpoint=str(path), data="digits", json=str(report), grid=False, **options)
    evaluate_checkpoint(config, ALONE)
    summary: dict[str, Any] = json.loads(report.read_text())["summary"]
    return summary


@pytest.mark.parametrize("after", [2, EPOCH - 1, EPOCH + 2], ids=["before a checkpoint", "evaluation", "later"])
def test_a_crashed_run_continues_from_its_last_checkpoint_to_the_bit(whole, tmp_path, monkeypatch, after):
    interrupted(monkeypatch, tmp_path, after, Crash())
    run(tmp_path)
    assert_equal(numbers(tmp_path), numbers(whole))


def test_a_run_that_is_stopped_again_and_again_continues_to_the_bit(whole, tmp_path, monkeypatch):
    for after in (1, 1, 1, 1, 2, EVALUATION_BATCHES + 2):
        interrupted(monkeypatch, tmp_path, after, signal.SIGUSR1)
    run(tmp_path)
    assert_equal(numbers(tmp_path), numbers(whole))
    environments = [json.loads(line) for line in (tmp_path / "environment.jsonl").read_text().splitlines()]
    assert [part["steps_before"] for part in environments] == [0, 1, 2, 3, 4, 4, 5]
    assert environments[0]["config"]["mode"] == "worst10"
    assert {"commit", "dirty", "versions", "hardware", "command"} <= environments[0].keys()


def test_checkpoints_come_every_so_many_steps(whole, tmp_path, monkeypatch):
    saved = []
    write = Saver.save

    def save(self: Saver, state: dict[str, Any], **options: Any) -> None:
        saved.append((state["epoch"], state["step"]))
        write(self, state, **options)

    monkeypatch.setattr(Saver, "save", save)
    run(tmp_path, checkpoint_every="3")
    assert saved == [(0, 3), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0)]
    assert_equal(numbers(tmp_path), numbers(whole))


def test_a_torn_checkpoint_is_named_and_set_aside_and_the_one_before_it_used(whole, tmp_path, monkeypatch, capfd):
    interrupted(monkeypatch, tmp_path, EPOCH + 2, signal.SIGTERM)
    content = (tmp_path / LAST).read_bytes()
    torn = content[: len(content) // 2]
    (tmp_path / LAST).write_bytes(torn)
    before = (tmp_path / PREVIOUS).read_bytes()
    interrupted(monkeypatch, tmp_path, 1, Crash())
    said = capfd.readouterr().out
    assert f"{tmp_path / LAST} is damaged" in said
    assert "resumed after 4 steps" in said
    # Renamed, so that the next checkpoint does not replace the good one with it.
    assert (tmp_path / f"{LAST}.damaged").read_bytes() == torn
    assert (tmp_path / PREVIOUS).read_bytes() == before
    run(tmp_path)
    assert_equal(numbers(tmp_path), numbers(whole))


def test_weights_that_are_no_numbers_are_not_saved_though_the_loss_was_one(tmp_path, monkeypatch):
    original = TrainStep.__call__

    def poisoned(self: Any, batch: Any) -> Any:
        result = original(self, batch)
        next(self.model.buffers()).fill_(float("inf"))
        next(iter(self.model.net.state_dict().values())).fill_(float("nan"))
        return result

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    with pytest.raises(UserError, match=r"NaN or inf at step 1 \(epoch 1\)"):
        run(tmp_path, checkpoint_every="1")
    assert not (tmp_path / LAST).exists()


def test_a_full_disk_is_told_even_to_a_run_that_was_asked_to_stop(tmp_path, monkeypatch, capfd):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fast_spatial.training.checkpoints.write_atomically", fail)
    count = 0

    def progress(_: float) -> None:
        nonlocal count
        count += 1
        if count == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(distributed, "reset_watchdog", progress)
    with pytest.raises(UserError, match="No space left"):
        run(tmp_path)
    assert "No space left on device" in capfd.readouterr().out


def test_the_scalars_of_tensorboard_survive_a_restart(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for part in range(2):
        log = RunLog(tmp_path, rank=0, gpus=0)
        log.begin(size=1, step=16 * part)
        log.scalars("train", 16 * (part + 1), loss=1.0)
        assert log.size >= 0
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [16, 32]


def test_a_folder_whose_checkpoints_are_all_damaged_is_left_alone(tmp_path):
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"last.pt, previous.pt.*damaged"):
        find_latest(tmp_path)
    assert (tmp_path / LAST).read_bytes() == b"half a file"


def test_a_best_checkpoint_is_not_overwritten_by_a_run_that_starts_anew(tmp_path):
    (tmp_path / BEST).write_bytes(b"precious")
    with pytest.raises(UserError, match=r"contains best.pt, but no last.pt"):
        find_latest(tmp_path)


def test_an_empty_folder_has_nothing_to_continue(tmp_path):
    assert find_latest(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dtype": "tf32"}, r"dtype: \w+ saved, tf32 given\)"),
        ({"max_train_images": "63"}, "max_train_images: 64 saved, 63 given; training images: .* saved, .* given"),
        ({"lr": "0.5"}, r"lr: 0.02 saved, 0.5 given\)"),
    ],
)
def test_a_checkpoint_of_other_numbers_is_refused(whole, flags, message):
    with pytest.raises(UserError, match=rf"contains a run with different settings \({message}"):
        run(whole, **flags)


def test_a_finished_run_says_so_and_stays_as_it_is(whole, capfd):
    before = (whole / LAST).read_bytes(), (whole / "log.jsonl").read_bytes()
    run(whole)
    assert "this run is finished" in capfd.readouterr().out
    assert before == ((whole / LAST).read_bytes(), (whole / "log.jsonl").read_bytes())


def test_a_loss_that_is_no_number_ends_the_run_and_the_good_checkpoint_stays(tmp_path, monkeypatch):
    interrupted(monkeypatch, tmp_path, 2, signal.SIGTERM)
    good = (tmp_path / LAST).read_bytes()

    calls = 0
    original = TrainStep.__call__

    def poisoned(self: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(self, batch)
        return result if calls == 1 else result._replace(loss=result.loss / 0)

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    with pytest.raises(UserError, match=r"NaN or inf at step 4 \(epoch 1\); last good checkpoint: .*last.pt"):
        run(tmp_path)
    assert (tmp_path / LAST).read_bytes() == good


def test_a_diverging_run_stops_within_the_logging_interval(tmp_path, monkeypatch):
    steps = []
    original = TrainStep.__call__

    def counted(self: Any, batch: Any) -> Any:
        steps.append(1)
        return original(self, batch)

    monkeypatch.setattr(TrainStep, "__call__", counted)
    with pytest.raises(UserError, match="training diverged"):
        run(tmp_path, lr="1e30", log_every="2", checkpoint_every="0")
    assert len(steps) <= 4
    assert not (tmp_path / LAST).exists()


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    leftover = tmp_path / ".writing-last.pt.elsewhere.4711"
    leftover.write_bytes(b"half")
    Saver(tmp_path)
    assert not leftover.exists()


def test_the_checkpoint_before_is_kept(tmp_path):
    saver = Saver(tmp_path)
    for value in (1.0, 2.0, 3.0):
        saver.save({"weights": torch.tensor([value])}, best=value == 2.0)
    saver.wait()
    found = {path.name: float(checkpoint.load(path)["weights"]) for path in tmp_path.iterdir()}
    assert found == {LAST: 3.0, PREVIOUS: 2.0, BEST: 2.0}


def test_a_state_is_saved_as_it_was_when_it_was_handed_over(tmp_path):
    weights = torch.zeros(1000)
    saver = Saver(tmp_path)
    saver.save({"nested": [{"weights": weights}]})
    weights.fill_(1.0)
    saver.wait()
    assert not checkpoint.load(tmp_path / LAST)["nested"][0]["weights"].any()


def test_a_full_disk_ends_in_an_error_that_says_so_and_the_older_checkpoint_is_whole(tmp_path):
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from fast_spatial.errors import UserError\n"
        "from fast_spatial.training.checkpoints import Saver\n"
        "saver = Saver(Path(sys.argv[1]))\n"
        "saver.save({'weights': torch.ones(10)}); saver.wait()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "saver.save({'weights': torch.ones(1 << 20)})\n"
        "try:\n"
        "    saver.wait()\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "cannot write a checkpoint (File too large); the earlier last.pt is intact" in ended.stdout
    assert checkpoint.load(tmp_path / LAST)["weights"].sum() == 10
    assert {path.name for path in tmp_path.iterdir()} == {LAST}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_failed_write_leaves_the_file_before_it(tmp_path):
    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("no space")

    (tmp_path / "a").write_bytes(b"whole")
    with pytest.raises(OSError, match="no space"):
        write_atomically(tmp_path / "a", fail, keep=tmp_path / "b")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"whole")]


def test_two_processes_cannot_write_the_same_run(tmp_path, monkeypatch):
    first = RunLog(tmp_path, rank=0, gpus=0)
    first.begin()
    monkeypatch.setattr("fast_spatial.runtime.runlog._LOCK_PATIENCE_SEC", 0.0)
    with pytest.raises(UserError, match="another process is writing this run"):
        RunLog(tmp_path, rank=0, gpus=0)
    first.close()
    RunLog(tmp_path, rank=0, gpus=0)


def test_an_out_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/run: cannot be written"):
        RunLog(tmp_path / "file" / "run", rank=0, gpus=0)


def test_a_log_goes_back_to_where_the_checkpoint_was_saved(tmp_path):
    log = RunLog(tmp_path, rank=0, gpus=0)
    log.begin()
    log.record("train", 1, loss=1.0)
    size = log.size
    log.record("train", 2, loss=2.0)
    log.close()
    log = RunLog(tmp_path, rank=0, gpus=0)
    log.begin(elapsed_sec=100, size=size, step=1)
    log.record("train", 2, loss=3.0)
    log.close()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == [1.0, 3.0]
    assert records[1]["elapsed_sec"] >= 100


def work(number: signal.Signals, *, fails: bool = False) -> None:
    """Work that gets a signal at its end."""
    with stop_requests() as request:
        assert request.signal_number == 0
        os.kill(os.getpid(), number)
        assert request.signal_number == number
        with pytest.raises(Stopped):
            request.obey()
        if fails:
            raise Crash


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_stops_what_would_follow_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as ended:
        work(number)
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_a_signal_does_not_hide_an_error():
    with pytest.raises(Crash):
        work(signal.SIGINT, fails=True)


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal_number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("steps", "seconds", "due"),
    [(3, 0.0, [3, 6, 9]), (0, 2.5, [3, 6, 9]), (0, 0.0, []), (0, 100.0, [])],
)
def test_checkpoints_are_due_by_steps_or_by_time(monkeypatch, steps, seconds, due):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    interval, found = CheckpointTimer(steps, seconds), []
    for step in range(1, 10):
        clock[0] += 1.0
        if interval(step):
            found.append(step)
    assert found == due


def test_a_process_alone_gets_its_wishes_at_once():
    ballot = StepAgreement(wishes=2)
    assert ballot(1, 0) == [1, 0]
    assert ballot(0, 15) == [0, 15]
