"""Training images per second by number of processes, one per GPU: the scaling over several GPUs.

Every count is a separate job, started through torchrun like `launch.py train`. The job runs this module:
python -m benchmarks.processes JSON
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.groups.step import make_step
from benchmarks.jobs import Findings, Job
from fast_spatial.config.commands import BenchConfig
from fast_spatial.kernels.host import cpus_per_process, usable_cpus
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime import distributed
from fast_spatial.runtime.device import synchronized_time
from fast_spatial.runtime.distributed import World

ROOT = Path(__file__).resolve().parent.parent
# Views per image, by mode.
VIEWS = {"standard": 1, "worst10": 11}
BATCHES = {"standard": 256, "worst10": 64}
ROUNDS = 3
TIMEOUT_SEC = 120


@dataclass(frozen=True)
class Work:
    """The work of every process: training steps on views in memory; `batches` holds images per step, by mode."""

    side: int
    batches: dict[str, int]
    seconds: float


def run(job: Job) -> Findings:
    """Measure with 1, 2, 4, ... and all GPUs of this machine; a failing count is skipped."""
    torch.cuda.empty_cache()  # GPU 0 is shared with this process
    return measure(counts_up_to(torch.cuda.device_count()), Work(job.config.image_size, BATCHES, job.config.seconds))


def counts_up_to(most: int) -> list[int]:
    """1, 2, 4, ... and `most` itself."""
    return sorted({1 << power for power in range(most.bit_length()) if 1 << power <= most} | {most})


def measure(counts: Sequence[int], work: Work) -> Findings:
    """Rates by mode and count, with the efficiency: the rate per process, relative to the first count's."""
    found = Findings.none()
    alone: dict[str, float] = {}
    for count in counts:
        print(f"  training in {_named(count)}", flush=True)
        try:
            result = _job(count, work)
        except (OSError, RuntimeError) as error:
            found.skipped[f"processes_{count}"] = str(error)
            continue
        for mode, rate in result["images_per_sec"].items():
            alone.setdefault(mode, rate / count)
            found.facts[f"train_{mode}_{work.side}px_{count}_processes"] = {
                "world_size": result["world_size"],
                "batch_per_process": work.batches[mode],
                "images_per_sec": round(rate, 1),
                "efficiency_pct": round(100 * rate / count / alone[mode], 1),
            }
    return found


def _named(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


def _job(count: int, work: Work) -> dict[str, Any]:
    """The result of a job with `count` processes.

    Raises:
        RuntimeError: if it failed, with the error or last line of its output, or took too long.

    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [sys.executable, *launcher, "-m", "benchmarks.processes", json.dumps([asdict(work), str(target)])]
        # As in launch.py: threads that spin at barriers take CPU time from the loader.
        threads = {"OMP_NUM_THREADS": str(max(1, usable_cpus() // count)), "OMP_WAIT_POLICY": "PASSIVE"}
        with open(Path(folder) / "said", "w+", encoding="utf-8") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**threads, **os.environ}, stdout=said, stderr=said, start_new_session=True
            )
            try:
                status = process.wait(TIMEOUT_SEC)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{_named(count)} took longer than {TIMEOUT_SEC} s") from None
            finally:
                if process.poll() is None:  # the launcher and its children
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if status or not target.is_file():
                said.seek(0)
                raise RuntimeError(f"{_named(count)} failed: {_reason(said.read())}")
        result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        return result


def _reason(said: str) -> str:
    """The error of a process in the launcher's output; its last line if there is none."""
    lines = [line.split("]:")[-1].strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line) and "ChildFailed" not in line]
    return [*errors, *lines[-1:], "no output"][0][:300]


def work_of(world: World, work: Work) -> dict[str, Any]:
    """The work of one process: returns images per second of all processes together, by mode."""
    torch.set_num_threads(cpus_per_process())
    torch.backends.cudnn.benchmark = True
    # Counted by an all-reduce, which exposes a process group that was not formed.
    together = int(distributed.all_reduce_sum(torch.ones(1, device=world.device)).item())
    rates = {mode: _rate(world, work, mode, together) for mode in work.batches}
    return {"world_size": together, "images_per_sec": rates}


def _rate(world: World, work: Work, mode: str, together: int) -> float:
    side, count, views = work.side, work.batches[mode], VIEWS[mode]
    job = Job(BenchConfig(image_size=side), world.device, cpus_per_process())
    torch.manual_seed(0)  # for reproducible timings; DDP broadcasts rank 0's weights
    step = make_step(job, scored=views > 1, compiled=False)
    generator = torch.Generator().manual_seed(world.rank)
    candidates = torch.randint(0, 256, (count, views, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 1000, (count,), generator=generator)
    batch = Batch(candidates.to(world.device), labels.to(world.device), torch.arange(count))

    def work_once() -> None:
        step(batch)

    _seconds(world, work_once, 2)
    # The same number of steps in all processes, from the slowest one's time: a step synchronizes them.
    steps = max(1, math.ceil(work.seconds / _seconds(world, work_once, 1)))
    spent = statistics.median(_seconds(world, work_once, steps) for _ in range(ROUNDS))
    return count * together * steps / spent


def _seconds(world: World, work: Callable[[], None], times: int) -> float:
    """Seconds for `times` calls, in the slowest process."""
    distributed.reset_watchdog(TIMEOUT_SEC / 60)
    distributed.barrier()
    start = synchronized_time(world.device)
    for _ in range(times):
        work()
    spent = torch.tensor(synchronized_time(world.device) - start, dtype=torch.float64, device=world.device)
    if world.world_size > 1:
        torch.distributed.all_reduce(spent, op=torch.distributed.ReduceOp.MAX)
    return spent.item()


def main(values: str) -> None:
    """Entry point of a process; rank 0 writes the result."""
    wanted, target = json.loads(values)
    world = distributed.start(TIMEOUT_SEC / 60)
    try:
        result = work_of(world, Work(**wanted))
        if world.rank == 0:
            Path(target).write_text(json.dumps(result), encoding="utf-8")
    finally:
        distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1])
