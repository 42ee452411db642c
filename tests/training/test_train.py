"""Whole trainings of a few steps: logs, seeds, profiles, memory estimate, ranks, and the watchdog."""

from __future__ import annotations

import json
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
from fast_spatial.data import loading
from fast_spatial.evaluation.evaluate import evaluate_checkpoint
from fast_spatial.kernels import host
from fast_spatial.models import checkpoint, classifier, memory
from fast_spatial.pipelines.loader import Loader
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.training.train import Training, train

ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _stand_down():
    yield
    distributed.stop()


def config_of(out: Path, **flags: str) -> TrainConfig:
    small = {"epochs": "3", "max_train_images": "64", "global_batch_size": "32", "views": "2", "milestones": "2"}
    raw = {"data": "digits", "mode": "worst10", "out": str(out), **small, **flags}
    return recipes.train_config(raw)


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_log_has_a_record_per_epoch_and_evaluation(tmp_path):
    train(config_of(tmp_path, epochs="2", eval_every="1", lr="0.01"), ALONE)
    found = records(tmp_path)
    assert [r["event"] for r in found] == ["train", "chosen", "evaluation"] * 2
    assert {"epoch", "loss", "top1_pct", "lr", "images_per_sec", "data_wait_pct", "elapsed_sec", "gpu_hours"} <= set(
        found[0]
    )
    assert {"top1_pct", "top5_pct", "loss", "attacked_top1_pct", "cost_pct"} <= set(found[2])
    assert found[2]["attacked_top1_pct"] <= found[2]["top1_pct"]
    assert any((tmp_path / "tensorboard").iterdir())
    best = checkpoint.load(tmp_path / "best.pt")
    assert best["best_pct"] == max(r["attacked_top1_pct"] for r in found if r["event"] == "evaluation")


def test_another_seed_gives_other_weights(tmp_path):
    for seed in ("0", "1"):
        train(config_of(tmp_path / seed, epochs="1", mode="random", seed=seed), ALONE)
    one, other = (checkpoint.load(tmp_path / seed / "last.pt")["model"]["fc.weight"] for seed in "01")
    assert not torch.equal(one, other)


def test_a_profile_has_named_ranges(tmp_path):
    train(config_of(tmp_path, epochs="1", global_batch_size="4", max_train_images="60", profile="2"), ALONE)
    events = json.loads((tmp_path / "profile.json").read_text())["traceEvents"]
    assert {"score", "forward", "backward", "optimizer"} <= {event.get("name") for event in events}


def test_a_resumed_run_is_profiled_in_an_epoch_that_is_long_enough(tmp_path):
    """The first one has two steps left."""
    flags = {"global_batch_size": "4", "max_train_images": "60", "checkpoint_every": "13", "eval_every": "0"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_finish_epoch", lambda *_: signal.default_int_handler(signal.SIGINT, None))
        with pytest.raises(KeyboardInterrupt):
            train(config_of(tmp_path, epochs="2", **flags), ALONE)
    distributed.stop()
    train(config_of(tmp_path, epochs="2", profile="2", **flags), ALONE)
    assert json.loads((tmp_path / "environment.jsonl").read_text().splitlines()[1])["steps_before"] == 13
    assert (tmp_path / "profile.json").is_file()


def test_the_memory_estimate_counts_what_a_real_forward_pass_saves():
    net = classifier.build("resnet18", 10)
    saved: dict[int, int] = {}
    kept = []

    def count(tensor):
        kept.append(tensor)
        if not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = net(torch.rand(4, 3, 64, 64).to(memory_format=torch.channels_last))
    assert output.shape == (4, 10)
    found = memory.estimate("resnet18", 10, side=64, batch=4, grad_accum_steps=1, views=1, half=False)
    assert found.activations_gib * 2**30 == pytest.approx(sum(saved.values()), rel=0.05)
    halved = memory.estimate("resnet18", 10, side=64, batch=4, grad_accum_steps=2, views=1, half=False)
    assert halved.activations_gib == pytest.approx(found.activations_gib / 2)


def test_a_process_that_stops_moving_prints_its_stacks_and_ends():
    code = (
        "import time\n"
        "from fast_spatial.runtime.distributed import reset_watchdog\n"
        "def waits_for_nothing():\n"
        "    reset_watchdog(0.02)\n"
        "    time.sleep(600)\n"
        "waits_for_nothing()\n"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 1
    assert "waits_for_nothing" in ended.stderr


@pytest.mark.parametrize(
    ("content", "expected"), [("150000 100000", 1), ("max 100000", 8), ("50000 100000", 1), ("x", 8)]
)
def test_cpus_are_those_of_the_affinity_mask_cut_to_the_container_quota(tmp_path, monkeypatch, content, expected):
    quota = tmp_path / "cpu.max"
    quota.write_text(content)
    monkeypatch.setattr(host, "CGROUP_V2", quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert host.usable_cpus() == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host.cpus_per_process() == max(1, expected // 4)


@pytest.mark.parametrize(("task", "of"), [("train", "training"), ("train", "evaluation"), ("evaluate", "evaluation")])
def test_loaders_are_given_the_global_rank(tmp_path, monkeypatch, task, of):
    """The local rank starts at 0 on each node: if it were used, two nodes would read the same images."""

    class Opened(Exception):
        pass

    def loader(sampler, **named):
        if sampler.train is (of == "training"):
            raise Opened(*sampler.shard)
        return Loader(sampler, **named)

    monkeypatch.setattr(loading, "Loader", loader)
    second_node = World(rank=3, local_rank=1, world_size=4, device=torch.device("cpu"))
    if task == "train":
        with pytest.raises(Opened) as opened:
            train(config_of(tmp_path), second_node)
    else:
        net = classifier.build("resnet18", 10)
        torch.save(net.state_dict(), tmp_path / "plain.pt")
        config = EvaluateConfig(checkpoint=str(tmp_path / "plain.pt"), data="digits", image_size=32)
        with pytest.raises(Opened) as opened:
            evaluate_checkpoint(config, second_node)
    assert opened.value.args == (3, 4)
