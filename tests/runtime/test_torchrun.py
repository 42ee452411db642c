"""torchrun's options, for versions of torch that support different ones."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
from torch.distributed import run

from fast_spatial import launcher
from fast_spatial.config.commands import EvaluateConfig
from fast_spatial.config.train import LaunchOptions, TrainConfig


@pytest.mark.parametrize("known", [True, False])
def test_the_time_to_shut_down_is_named_where_torchrun_knows_it(monkeypatch, known):
    real = run.get_args_parser()
    asked: list[str] = []

    def parser():
        made = argparse.ArgumentParser(add_help=False, conflict_handler="resolve")
        for action in real._actions:
            if "--shutdown-timeout" not in action.option_strings:
                made._add_action(action)
        if known:
            made.add_argument("--shutdown-timeout", "--shutdown_timeout", type=int)
        return made

    monkeypatch.setattr(run, "get_args_parser", parser)
    monkeypatch.setattr(run, "main", asked.extend)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    launcher.torchrun(TrainConfig(data="d", mode="standard", out="o"), "job", 2, ["train", "{}", "null"])
    assert ("--shutdown-timeout=120" in asked) == known
    parsed = parser().parse_args(asked)
    assert parsed.nproc_per_node == "2"
    assert parsed.training_script == "fast_spatial.worker"
    assert parsed.training_script_args == ["train", "{}", "null"]


def test_the_installed_torchrun_takes_all_options():
    options = ["--standalone", *launcher._shutdown_options(), "-m", "fast_spatial.worker"]
    assert run.get_args_parser().parse_args(options).training_script == "fast_spatial.worker"


def test_all_nodes_name_the_same_rendezvous():
    """The options of a node may differ from another's."""
    one = TrainConfig(data="d", mode="standard", out="o", nnodes="2", rdzv_endpoint="h:1")
    other = replace(one, node_rank=1, nproc_per_node=4, workers=3, decode="cpu", warp="dali", data="e")
    assert launcher.rendezvous_id("train", other) == launcher.rendezvous_id("train", one)


def test_every_task_of_a_job_has_a_rendezvous_of_its_own():
    train = TrainConfig(data="d", mode="standard", out="o")
    judged = EvaluateConfig(data="d", checkpoint="o/best.pt")
    tasks: list[tuple[str, LaunchOptions]] = [
        ("train", train),
        ("train", replace(train, out="p")),
        ("train", replace(train, rdzv_id="17")),
    ]
    tasks += [("evaluate", judged), ("evaluate", replace(judged, checkpoint="p/best.pt")), ("landscape", judged)]
    found = [launcher.rendezvous_id(task, config) for task, config in tasks]
    assert len(set(found)) == len(tasks)
    assert [name.rpartition("-")[0] for name in found].count("17") == 1
