"""The scripts of docs/slurm.md, run as they stand: with stand-ins for srun and scontrol, and real training on CPUs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_spatial.config.cli import options_of, read_flags
from fast_spatial.config.fields import parse
from fast_spatial.config.train import TrainConfig
from fast_spatial.models import checkpoint

ROOT = Path(__file__).parents[2]
NAMES = ("one_node", "two_nodes", "preemptible")
# Starts as many tasks as there are nodes, and ends with the highest status, as srun does.
SRUN = """#!/bin/bash
echo "srun $*" >>"$CALLS"
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < SLURM_JOB_NUM_NODES; task++)); do "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do wait "$task"; ended=$?; ((ended > status)) && status=$ended; done
exit $status
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$CALLS"
[[ "$1 $2" == "show hostnames" ]] && printf '127.0.0.1\\n127.0.0.2\\n'
exit 0
"""
# In the place of the installed Python: an end without a beginning; or a small run of the real thing.
ENDS = """#!/bin/bash
echo "python $*" >>"$CALLS"
exit $STATUS
"""
SMALL = "--views 1 --max-train-images 256 --global-batch-size 16 --milestones 1 --eval-every 0 --stall-minutes 2"
TRAINS = f"""#!/bin/bash
exec {sys.executable} {ROOT}/launch.py "${{@:2}}" --epochs 4 {SMALL}
"""


def scripts() -> dict[str, str]:
    """The scripts by their jobs' names."""
    text = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    found = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", text, flags=re.DOTALL)
    return {re.search(r"--job-name=(\w+)", script)[1]: script for script in found}  # type: ignore[index]


def options(script: str) -> dict[str, str]:
    """What a script asks of sbatch."""
    words = " ".join(re.findall(r"^#SBATCH (.*)$", script, flags=re.MULTILINE)).split()
    return {name: value for name, _, value in (word.partition("=") for word in words)}


class Cluster:
    """A folder to submit from, with the stand-ins on its PATH."""

    def __init__(self, folder: Path, python: str) -> None:
        self.folder, self.calls, self.out = folder, folder / "calls", folder / "run"
        self.calls.touch()
        for name, content in {"bin/srun": SRUN, "bin/scontrol": SCONTROL, ".venv/bin/python": python}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
            (folder / name).chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def submit(self, name: str, status: int = 0) -> subprocess.Popen[str]:
        """Run a script as Slurm would, on data and in a folder that there are."""
        script = scripts()[name]
        asked = options(script)
        for there, here in {
            "/data/imagenet": "digits",
            "/runs/worst10_30": str(self.out),
            "29500": str(self.port),
        }.items():
            script = script.replace(there, here)
        (self.folder / "job.sh").write_text(script)
        nodes = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": asked["--nodes"], "SLURM_JOB_ID": "4711"}
        return subprocess.Popen(
            ["bash", "job.sh"],
            cwd=self.folder,
            env={
                **{**os.environ, **nodes, "SLURM_CPUS_PER_TASK": asked["--cpus-per-task"]},
                **{"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "CALLS": str(self.calls), "STATUS": str(status)},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def called(self, command: str) -> list[str]:
        """The words of every call of a command."""
        lines = self.calls.read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{command} ")]

    def wait_for_the_log(self, job: subprocess.Popen[str]) -> None:
        log, deadline = self.out / "log.jsonl", time.monotonic() + 600
        while not (log.is_file() and log.stat().st_size):
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_starts_one_launcher_on_each_node_with_flags_that_exist(tmp_path, name):
    cluster = Cluster(tmp_path, ENDS)
    job = cluster.submit(name)
    said, _ = job.communicate(timeout=300)
    assert (job.returncode, said) == (0, "")
    asked = options(scripts()[name])
    assert (asked["--ntasks-per-node"], asked["--gpus-per-node"]) == ("1", "8")
    assert f"--cpus-per-task={asked['--cpus-per-task']}" in cluster.called("srun")[0].split()
    starts = cluster.called("python")
    assert len(starts) == int(asked["--nodes"])
    assert len(set(starts)) == 1
    words = starts[0].split()
    assert words[:2] == ["launch.py", "train"]
    config = parse(TrainConfig, read_flags(words[2:], options_of(TrainConfig)))
    assert (config.nnodes, config.nproc_per_node) == (asked["--nodes"], 0)
    assert config.rdzv_endpoint == ("" if asked["--nodes"] == "1" else f"127.0.0.1:{cluster.port}")


@pytest.mark.parametrize(
    ("status", "requeued"),
    [(128 + signal.SIGUSR1, True), (0, False), (1, False), (2, False), (128 + signal.SIGTERM, False)],
)
def test_only_a_run_that_its_time_limit_stopped_is_queued_again(tmp_path, status, requeued):
    cluster = Cluster(tmp_path, ENDS)
    job = cluster.submit("preemptible", status)
    job.communicate(timeout=300)
    assert job.returncode == status
    assert cluster.called("scontrol") == ["requeue 4711"] * requeued


def test_the_warning_goes_to_the_tasks_and_leaves_time_to_save():
    asked = options(scripts()["preemptible"])
    number, _, seconds = asked["--signal"].partition("@")  # no "B:", which would mean the script alone
    assert number == "USR1"
    assert int(seconds) >= 60
    assert asked["--open-mode"] == "append"
    assert "--requeue" in asked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["preemptible", "two_nodes"])
def test_a_warned_job_saves_and_ends_and_its_next_start_continues(tmp_path, name):
    cluster = Cluster(tmp_path, TRAINS)
    job = cluster.submit(name)
    cluster.wait_for_the_log(job)
    (srun,) = children(job.pid)
    tasks = children(srun)
    assert len(tasks) == int(options(scripts()[name])["--nodes"])
    for task in tasks:
        os.kill(task, signal.SIGUSR1)
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 128 + signal.SIGUSR1, said
    assert "stopped by SIGUSR1; run the same command to resume" in said
    requeued = ["requeue 4711"] if name == "preemptible" else []
    assert [call for call in cluster.called("scontrol") if call.startswith("requeue")] == requeued
    saved = checkpoint.load(cluster.out / "last.pt")
    assert 1 <= saved["epoch"] < 4

    job = cluster.submit(name)
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, said
    assert checkpoint.load(cluster.out / "last.pt")["epoch"] == 4
    assert [call for call in cluster.called("scontrol") if call.startswith("requeue")] == requeued
