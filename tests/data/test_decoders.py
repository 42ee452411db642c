"""All processes of a task use the lowest rung that any of them found; it is printed and recorded."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from fast_spatial import worker
from fast_spatial.config.commands import CalibrateConfig, EvaluateConfig, LandscapeConfig
from fast_spatial.config.fields import to_json
from fast_spatial.config.train import TrainConfig
from fast_spatial.data import decoders, loading
from fast_spatial.data.decoders import find_decoding, keep_failure, previous_placement
from fast_spatial.data.placing import placement_of
from fast_spatial.evaluation.evaluate import evaluate_checkpoint
from fast_spatial.evaluation.landscape import landscape
from fast_spatial.pipelines.inspection import probe
from fast_spatial.pipelines.inspection.probe import Choice, Trial
from fast_spatial.pipelines.loader import Loader
from fast_spatial.pipelines.placement import RUNGS, Decoding
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.tools import doctor_checks as checks
from fast_spatial.training.train import train

ALONE = World(0, 0, 1, torch.device("cpu"))
GPU = World(0, 0, 1, torch.device("cuda"))
TINY: dict[str, Any] = {
    "epochs": 1,
    "max_train_images": 32,
    "global_batch_size": 16,
    "views": 2,
    "milestones": (1,),
    "lr": 0.01,
}


@pytest.fixture(autouse=True)
def _stand_down() -> Iterator[None]:
    yield
    distributed.stop()


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, dict[str, Any]]]:
    """The decodings that were probed; the result is the second rung."""
    found: list[tuple[str, dict[str, Any]]] = []

    def choose(wanted: str, **about: Any) -> Choice:
        found.append((wanted, about))
        trial = Trial(RUNGS[0], "crashed (SIGSEGV)", None, None, 0, 3.0)
        return Choice(RUNGS[1], "not GPU, regions, 65% by the JPEG engine: crashed (SIGSEGV)", (trial,))

    monkeypatch.setattr(decoders, "choose", choose)
    return found


def config_of(out: Path, **values: Any) -> TrainConfig:
    return TrainConfig(data="digits", mode="standard", out=str(out), arch="resnet18", image_size=32, **TINY, **values)


def test_a_training_may_use_the_engine_and_verdicts_may_not(asked, tmp_path, capfd):
    training, evaluation = config_of(tmp_path), EvaluateConfig(checkpoint="best.pt", data="digits")
    calibration = CalibrateConfig(trainings=(to_json(config_of(tmp_path, decode="gpu-full")),))
    for config in (training, config_of(tmp_path, deterministic=True), evaluation, calibration):
        world = find_decoding(config, GPU)
        assert world.decoding is not None
        assert world.decoding.decoding == RUNGS[1]
    loads = [about["hw_decoder_load"] for _, about in asked]
    assert loads == [0.65, 0.0, 0.0, 0.65]
    assert [wanted for wanted, _ in asked] == ["auto", "auto", "auto", "gpu-full"]
    assert all(about["on_gpu"] for _, about in asked)
    said = capfd.readouterr().out.splitlines()
    assert said == [f"decoding: {RUNGS[1]} (not GPU, regions, 65% by the JPEG engine: crashed (SIGSEGV))"] * 4


def test_what_was_found_is_used(asked, tmp_path):
    config = config_of(tmp_path)
    world = find_decoding(config, GPU)
    assert placement_of(config, world, exact=False).decoding == RUNGS[1]


def test_what_evaluations_of_a_training_use_was_tried_too(tmp_path, monkeypatch, capfd):
    asked, now = [], [100]

    def choose(wanted: str, *, on_gpu: bool, hw_decoder_load: float) -> Choice:
        asked.append(hw_decoder_load)
        now[0] += 10
        return Choice(RUNGS[0], "probed") if hw_decoder_load else Choice(RUNGS[2], "not regions: it hangs")

    monkeypatch.setattr(decoders, "choose", choose)
    monkeypatch.setattr(decoders, "time", SimpleNamespace(monotonic=lambda: now[0]))
    config = config_of(tmp_path)
    world = find_decoding(config, GPU)
    assert asked == [0.65, 0.0]
    assert placement_of(config, world, exact=False).decoding == RUNGS[0]
    assert placement_of(config, world, exact=True).decoding == RUNGS[2]
    assert world.probe_sec == 20
    assert capfd.readouterr().out.splitlines() == [
        f"decoding: {RUNGS[0]} (probed)",
        f"for evaluations, decoding: {RUNGS[2]} (not regions: it hangs)",
    ]


def test_numba_views_are_decoded_on_the_cpu_without_a_probe(asked, tmp_path):
    find_decoding(config_of(tmp_path, warp="numba"), GPU)
    assert [wanted for wanted, _ in asked] == ["cpu"]


def test_on_a_cpu_nothing_is_said(tmp_path, capfd):
    world = find_decoding(config_of(tmp_path), ALONE)
    assert world.decoding == Choice(Decoding("cpu"), "no GPU in use")
    assert capfd.readouterr().out == ""


def agree(rank: int, port: int, out: str) -> None:
    """The first of two processes; the second found a lower rung."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    own = (Choice(RUNGS[0], "probed"), Choice(RUNGS[2], "not GPU, regions: it hangs"))[rank]
    with mock.patch.object(decoders, "choose", return_value=own):
        world = find_decoding(config_of(Path(out)), World(rank, rank, 2, torch.device("cpu")))
    assert world.decoding is not None and world.exact_decoding is not None
    assert world.exact_decoding.decoding == world.decoding.decoding
    (Path(out) / f"{rank}.json").write_text(json.dumps(world.decoding.to_json()))
    distributed.stop()


def test_all_processes_take_the_lowest_rung(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(agree, (port, str(tmp_path)), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["decoding"] == second["decoding"] == {"on": "gpu-full", "hw_decoder_load": 0.0}
    assert first["why"] == "limited by process 1: not GPU, regions: it hangs"
    assert second["why"] == "not GPU, regions: it hangs"


def test_a_run_records_its_decoding_and_says_when_it_changes(tmp_path, capfd):
    worker.run("train", to_json(config_of(tmp_path)))
    said = capfd.readouterr().out
    assert " changed at step " not in said
    environments = tmp_path / "environment.jsonl"
    record = json.loads(environments.read_text())
    assert record["decoding"] == {
        "decoding": {"on": "cpu", "hw_decoder_load": 0.0},
        "why": "no GPU in use",
        "trials": [],
    }
    assert previous_placement(environments) == (Decoding("cpu"), "numba")
    record["decoding"]["decoding"] = {"on": "gpu", "hw_decoder_load": 0.65}
    record["warp"] = "dali"
    environments.write_text(json.dumps(record) + "\n")
    worker.run("train", to_json(config_of(tmp_path)))
    said = capfd.readouterr().out
    assert f"decoding changed at step 2: from {RUNGS[0]} to CPU" in said
    assert "warp changed at step 2: from dali to numba" in said
    last = json.loads(environments.read_text().splitlines()[-1])
    assert last["steps_before"] == 2
    assert last["decoding"]["decoding"]["on"] == "cpu"


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"decoding": null}\n', '{"decoding": {"decoding": {"by": 1}}}\n'])
def test_what_cannot_be_told_is_not(text, tmp_path):
    path = tmp_path / "environment.jsonl"
    assert previous_placement(path) == (None, None)
    path.write_text(text)
    assert previous_placement(path) == (None, None)


class Failing(Loader):
    """A loader that reports a failure before its second batch."""

    def __init__(self, *words: Any, on_gpu_failure: Any, **options: Any) -> None:
        super().__init__(*words, on_gpu_failure=on_gpu_failure, **options)
        self._tell = on_gpu_failure

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
        for number, batch in enumerate(super().epoch(epoch, start_step)):
            if number == 1:
                self._tell("the GPU failed")
            yield batch


def failing(*, train: bool) -> Callable[..., Loader]:
    """Loaders: those for training, or those for evaluation, report a failure."""
    return lambda sampler, **options: (Failing if sampler.train is train else Loader)(sampler, **options)


def test_a_gpu_that_fails_is_named_by_training_evaluation_and_landscape(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "Loader", failing(train=False))
    train(config_of(tmp_path), ALONE)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "decoding"]  # between epochs
    assert (event["steps_before"], event["what"]) == (2, "the GPU failed")
    about: Any = {"checkpoint": str(tmp_path / "last.pt"), "data": "digits", "image_size": 32}
    found = tmp_path / "found.json"
    few: Any = {"max_images": 40, "batch_size_per_process": 20, "grid": False, "views": 1}
    evaluate_checkpoint(EvaluateConfig(**about, **few, json=str(found)), ALONE)
    assert json.loads(found.read_text())["decoding_failures"] == ["process 0: the GPU failed"]
    config = LandscapeConfig(**about, out=str(tmp_path / "landscape"), images_per_class=1, views_per_forward=775)
    landscape(config, ALONE)
    (written,) = (tmp_path / "landscape").glob("*.json")
    assert json.loads(written.read_text())["decoding_failures"] == ["process 0: the GPU failed"]


def test_failures_of_other_processes_have_a_file(tmp_path):
    for steps in (3, 5):
        keep_failure(tmp_path, 1, "the GPU failed", steps)
    lines = (tmp_path / "decoding.rank_1.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"steps_before": n, "what": "the GPU failed"} for n in (3, 5)]


def test_a_gpu_that_fails_is_in_the_log(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(loading, "Loader", failing(train=True))
    train(config_of(tmp_path), ALONE)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "decoding"]
    assert (event["steps_before"], event["what"]) == (1, "the GPU failed")
    assert "the GPU failed" in capfd.readouterr().out


def test_the_doctor_says_what_is_right_and_what_is_not(monkeypatch):
    found = Choice(RUNGS[0], "probed: at most 0.40/255", (Trial(RUNGS[0], "", 0.4, 0.0, 9, 1.0),))
    monkeypatch.setattr(probe, "choose", lambda *_, **__: found)
    assert checks.check_decoding() == ("ok", f"{RUNGS[0]} (probed: at most 0.40/255)", "")
    failed = Trial(RUNGS[0], "crashed", None, None, 0, 1.0)
    monkeypatch.setattr(probe, "choose", lambda *_, **__: Choice(RUNGS[3], "not that", (failed,)))
    state, about, fix = checks.check_decoding()
    assert (state, about) == ("warning", "CPU (not that)")
    assert fix.startswith("no action needed")


def test_the_doctor_without_a_gpu():
    if not torch.cuda.is_available():
        assert checks.check_decoding().found == "CPU (no GPU in use)"
