"""Whole runs with external faults: lost workers, lost data, unwritable folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_spatial.models import checkpoint
from fast_spatial.pipelines.digits import export_digits

ROOT = Path(__file__).parents[2]
NOBODY = 65534
HANG_SEC = 600
# Epochs of a training that does not end by itself while a test waits.
ENDLESS = 100_000
SMALL = {
    **{"data": "digits", "mode": "random", "max-train-images": 256, "global-batch-size": 16, "epochs": 3},
    **{"milestones": 1, "eval-every": 0, "checkpoint-every": 5, "stall-minutes": 2},
}


def start(out: Path, **options: Any) -> subprocess.Popen[str]:
    words = [str(word) for name, value in {**SMALL, **options}.items() for word in (f"--{name}", value)]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), "train", *words, "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + HANG_SEC
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)


def output(run: subprocess.Popen[str]) -> tuple[str, str]:
    """What it wrote to stdout and stderr until it ended; it is killed if it does not end."""
    try:
        return run.communicate(timeout=HANG_SEC)
    except subprocess.TimeoutExpired:
        run.kill()
        raise


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def two_nodes(out: Path, *, kill: bool) -> dict[str, Any]:
    """A run of two agents with one process each, over the loopback. One loses its worker after a checkpoint."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        start(
            out,
            **{"nnodes": 2, "nproc-per-node": 1, "node-rank": rank, "rdzv-endpoint": f"127.0.0.1:{port}"},
            **{"max-restarts": 2},
        )
        for rank in range(2)
    ]
    if kill:
        wait_for((out / "last.pt").is_file, agents[1])
        (worker,) = children(agents[1].pid)
        os.kill(worker, signal.SIGKILL)
    for agent in agents:
        stdout, stderr = output(agent)
        assert agent.returncode == 0, stdout + stderr
    return checkpoint.load(out / "last.pt")


@pytest.mark.slow
def test_two_nodes_go_on_after_one_lost_its_worker_to_the_same_weights(tmp_path):
    whole = two_nodes(tmp_path / "whole", kill=False)
    disturbed = two_nodes(tmp_path / "disturbed", kill=True)
    starts = [json.loads(line) for line in (tmp_path / "disturbed" / "environment.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[1]["steps_before"] > 0
    assert starts[1]["world_size"] == 2
    assert all(torch.equal(value, disturbed["model"][name]) for name, value in whole["model"].items())
    assert disturbed["epoch"] == whole["epoch"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_two_processes_save_and_stop_on_a_signal(tmp_path, number):
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, and so by processes that are started from here")
    run = start(tmp_path, **{"nproc-per-node": 2, "checkpoint-every": 0, "epochs": ENDLESS})
    wait_for(lambda: (tmp_path / "log.jsonl").is_file() and (tmp_path / "log.jsonl").stat().st_size, run)
    run.send_signal(number)
    stdout, stderr = output(run)
    assert run.returncode == 128 + number, stderr
    assert f"stopped by {number.name}; run the same command to resume" in stdout
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["epoch"] * 16 + saved["step"] > 16


@pytest.mark.slow
def test_a_data_folder_that_disappears_is_named_and_the_checkpoint_stays(tmp_path):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(export_digits(), data)
    run = start(out, data=data, **{"image-size": 32}, lr=0.02, epochs=ENDLESS)
    wait_for((out / "last.pt").is_file, run)
    data.rename(tmp_path / "gone")
    stdout, stderr = output(run)
    assert run.returncode == 1, stdout
    message = stderr.splitlines()[-2]
    assert message.startswith(f"launch.py: {data}/train/")
    assert "No such file or directory" in message
    assert checkpoint.load(out / "last.pt")["model"]
    (tmp_path / "gone").rename(data)
    run = start(out, data=data, **{"image-size": 32}, lr=0.02, epochs=ENDLESS)
    wait_for(lambda: len((out / "environment.jsonl").read_text().splitlines()) == 2, run)
    run.kill()
    run.communicate()


@pytest.mark.slow
def test_a_killed_launcher_takes_its_workers_along(tmp_path):
    run = start(tmp_path, **{"nproc-per-node": 2, "epochs": ENDLESS})
    wait_for((tmp_path / "last.pt").is_file, run)
    workers = children(run.pid)
    assert len(workers) == 2
    run.kill()
    output(run)
    give_up = time.monotonic() + HANG_SEC
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < give_up
        time.sleep(0.1)


@pytest.mark.slow
def test_the_fault_drill_loses_nothing(tmp_path):
    words = [sys.executable, "-m", "benchmarks.faults", "--kills", "12", "--json", str(tmp_path / "faults.json")]
    subprocess.run(words, cwd=ROOT, check=True, timeout=7200)
    found = json.loads((tmp_path / "faults.json").read_text())
    assert found["kills"] == found["resumed"] == found["bit_identical"] == 12
    assert all(found["by_phase"].values())


def test_an_out_that_this_user_cannot_write_is_refused_before_anything_starts(tmp_path):
    """As a user other than root, because root may write anywhere."""
    code = (
        "import os, sys\n"
        "from fast_spatial import preflight\n"
        "from fast_spatial.config.train import TrainConfig\n"
        "from fast_spatial.errors import UserError\n"
        "config = TrainConfig(data='digits', mode='random', out=sys.argv[1])\n"
        "if os.getuid() == 0:\n"
        f"    os.setuid({NOBODY})\n"
        "try:\n"
        "    preflight.check_out(config)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    ended = subprocess.run(
        [sys.executable, "-c", code, str(locked / "run")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "no permission to write to" in ended.stdout
