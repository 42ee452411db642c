"""The fault drill: kill runs of the digits in every phase, resume them, and compare with uninterrupted runs.

    python -m benchmarks.faults --json benchmarks/results/faults.json [--kills 36] [--seed 0]

Every run is `launch.py train` as a user starts it, in one and in two processes. The drill reads its progress bar from a
terminal, and kills the run when the phase is reached. It kills all processes (SIGKILL, as in a power failure), one
process (SIGKILL to the launcher or a worker), or stops the run (SIGTERM to the launcher, as schedulers do). Then it
runs the same command again to the end. Weights, optimizer, BatchNorm buffers and log must equal those of an
uninterrupted run to the bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fast_spatial.models import checkpoint
from fast_spatial.runtime.environment import environment
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.run_files import LAST

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, STEPS_PER_EPOCH, SAVE_EVERY = 2, 16, 5
OPTIONS = {
    **{"data": "digits", "mode": "worst10", "views": 2, "max-train-images": 256, "global-batch-size": 16},
    **{"epochs": EPOCHS, "milestones": 1, "eval-every": 1, "checkpoint-every": SAVE_EVERY, "deterministic": "true"},
    **{"log-every": 1, "stall-minutes": 2},
}
TIMINGS = ("elapsed_sec", "gpu_hours", "images_per_sec", "data_wait_pct", "cost_pct")
PATIENCE_SEC = 300.0
HOWS = ("SIGKILL all", "SIGKILL one", "SIGTERM")


@dataclass
class Run:
    """A `launch.py train` process, whose progress bar is read from a terminal."""

    out: Path
    processes: int
    steps: int = 0
    evaluates: bool = False
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        words = [str(word) for name, value in OPTIONS.items() for word in (f"--{name}", value)]
        master, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (50, 200))  # without a size, tqdm prints nothing
        self.process = subprocess.Popen(
            [sys.executable, "launch.py", "train", *words, "--out", self.out, "--nproc-per-node", str(self.processes)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        self._reader = threading.Thread(target=self._read, args=(master,), daemon=True)
        self._reader.start()

    def _read(self, master: int) -> None:
        with suppress(OSError):  # reading fails after the terminal's last process has ended
            while text := os.read(master, 1 << 16).decode(errors="replace"):
                self.said.append(text)
                for epoch, done in re.findall(rf"epoch (\d+)/{EPOCHS}\s+\d+% .*?(\d+)/{STEPS_PER_EPOCH}", text):
                    self.steps = max(self.steps, (int(epoch) - 1) * STEPS_PER_EPOCH + int(done))
                self.evaluates = "evaluate" in text if "epoch" in text or "evaluate" in text else self.evaluates
        os.close(master)

    def processes_of(self) -> list[int]:
        """PIDs of the launcher and its descendants."""
        parents = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def workers(self) -> list[int]:
        """PIDs of the training processes."""
        found = []
        for pid in self.processes_of()[1:]:
            with suppress(OSError):
                if b"fast_spatial.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def kill(self, how: str, chance: random.Random) -> None:
        """Kill in one of the ways, and wait until all processes have ended."""
        known = self.processes_of()
        if how == "SIGKILL all":
            for pid in known:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif how == "SIGKILL one":
            with suppress(ProcessLookupError):
                os.kill(chance.choice([self.process.pid, *self.workers()]), signal.SIGKILL)
        else:
            self.process.terminate()
        self.wait(known)

    def wait(self, known: list[int] | None = None) -> int:
        """Wait for the launcher and for the `known` processes; returns the launcher's exit status."""
        status = self.process.wait(PATIENCE_SEC)
        deadline = time.monotonic() + PATIENCE_SEC
        while any(_runs(pid) for pid in known or ()):
            if time.monotonic() > deadline:
                raise RuntimeError("a process still runs after its launcher ended:\n" + "".join(self.said))
            time.sleep(0.05)
        return status

    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(self.out.glob(".writing-*.pt.*"))

    def saved(self) -> bool:
        """Whether a checkpoint exists."""
        return (self.out / LAST).is_file()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


# By phase: the condition to wait for, and the largest random delay before the kill, in seconds.
PHASES: dict[str, tuple[Callable[[Run], bool], float]] = {
    "start-up": (lambda run: True, 4.0),
    "before the first checkpoint": (lambda run: 1 <= run.steps < SAVE_EVERY, 0.0),
    "mid-step": (lambda run: run.saved() and run.steps > SAVE_EVERY, 0.3),
    "mid-write": (lambda run: run.steps > SAVE_EVERY and run.writing(), 0.03),
    "evaluation": (lambda run: run.evaluates and run.steps >= STEPS_PER_EPOCH, 0.1),
    "last step": (lambda run: run.steps >= EPOCHS * STEPS_PER_EPOCH - 1, 0.0),
}


def disturbed(out: Path, processes: int, phase: str, how: str, chance: random.Random) -> dict[str, Any]:
    """Kill a run once, and resume it to its end; returns the outcome."""
    ready, delay = PHASES[phase]
    run = Run(out, processes)
    deadline = time.monotonic() + PATIENCE_SEC
    while not ready(run):
        if run.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run did not reach the phase {phase}; its output:\n{''.join(run.said)}")
        time.sleep(0.001)
    time.sleep(chance.uniform(0, delay))
    killed = run.process.poll() is None
    writing, saved = run.writing(), run.saved()
    run.kill(how, chance)
    steps = run.steps
    again = Run(out, processes)
    status = again.wait()
    resumed = status == 0 and checkpoint.load(out / LAST)["epoch"] == EPOCHS
    if not resumed:
        print("".join(again.said), file=sys.stderr)
    parts = [json.loads(line)["steps_before"] for line in (out / "environment.jsonl").read_text().splitlines()]
    return {
        "processes": processes,
        "phase": phase,
        "how": how,
        "killed": killed,
        "exit_status": run.process.returncode,
        "checkpoint_there": saved,
        "checkpoint_being_written": writing,
        "steps_seen": steps,
        "continued_after": parts[-1],
        "lost_steps": max(0, steps - parts[-1]),
        "resumed": resumed,
    }


def numbers(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What must be equal to the bit: the last checkpoint, and the log without its timings."""
    saved = {k: v for k, v in checkpoint.load(out / LAST).items() if k not in ("elapsed_sec", "log_size", "config")}
    records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return saved, [{k: v for k, v in record.items() if k not in TIMINGS} for record in records]


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def drill(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """The drill in a folder; the content of its result file."""
    chance = random.Random(seed)
    whole = {}
    for processes in (1, 2):
        out = folder / f"whole_{processes}"
        if Run(out, processes).wait() != 0:
            raise RuntimeError(f"an uninterrupted run failed; see {out}")
        whole[processes] = numbers(out)
    cases = list(itertools.islice(itertools.cycle(itertools.product(HOWS, (1, 2), PHASES)), kills))
    found = []
    for number, (how, processes, phase) in enumerate(cases, 1):
        out = folder / "disturbed"
        result = disturbed(out, processes, phase, how, chance)
        result["bit_identical"] = result["resumed"] and same(numbers(out), whole[processes])
        shutil.rmtree(out)
        found.append(result)
        print(f"[{number}/{kills}] " + ", ".join(f"{name} {value}" for name, value in result.items()), flush=True)
    alone = [result for result in found if result["processes"] == 1]
    return {
        "kills": sum(result["killed"] for result in found),
        "by_phase": {phase: sum(r["killed"] for r in found if r["phase"] == phase) for phase in PHASES},
        "by_way": {how: sum(r["killed"] for r in found if r["how"] == how) for how in HOWS},
        "resumed": sum(result["resumed"] for result in found),
        "bit_identical": sum(result["bit_identical"] for result in found),
        "bit_identical_on_1_process": f"{sum(r['bit_identical'] for r in alone)} of {len(alone)}",
        "checkpoint_every_steps": SAVE_EVERY,
        "lost_steps_max": max(result["lost_steps"] for result in found),
        "lost_steps_max_sigterm": max((r["lost_steps"] for r in found if r["how"] == "SIGTERM"), default=0),
        "runs": found,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Kill runs in every phase, and compare resumed with uninterrupted ones."
    )
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--kills", type=int, default=36, help="number of runs to kill (36: each phase in each way)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random delays")
    options = parser.parse_args()
    about = environment()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        result = drill(options.kills, options.seed, Path(folder))
    summary = {name: value for name, value in result.items() if name != "runs"}
    print("\n".join(f"{name}: {value}" for name, value in summary.items()))
    if options.json:
        command = f"python -m benchmarks.faults --kills {options.kills} --seed {options.seed}"
        write_json(options.json, {**about, "command": command, **result})
    return 0 if result["resumed"] == len(result["runs"]) else 1


if __name__ == "__main__":
    sys.exit(main())
