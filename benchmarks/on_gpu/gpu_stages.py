"""All GPU tests and measurements, in independent stages: the program behind `benchmarks/gpu.sh`.

    python -m benchmarks.on_gpu.gpu_stages [--dry] [--seconds 480] [--only STAGE,...] OUT

Each stage is a process with a time-out, and writes OUT/STAGE.json and OUT/STAGE.log. OUT/gpu.json holds all results and
is rewritten after each stage. Stages that do not fit into the time are listed; `--only` runs them later. This module
imports only the standard library, so that a missing or broken package becomes a result.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.on_gpu.goals import rows, table
from fast_spatial.runtime.environment import code_version
from fast_spatial.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[2]
SECONDS, DRY_SECONDS = 480.0, 3600.0
DRY_FACTOR = 8  # time-outs are multiplied by this on a CPU
IMPORT_SEC = 90.0
TERM_SEC = 5.0


@dataclass(frozen=True)
class Stage:
    """Requirements of a stage.

    Attributes:
        seconds: time-out.
        least: least remaining time in seconds; with less, it does not start.
        needs: required packages besides torch.
        waits: whether it needs the synthetic images and compiled numba kernels.

    """

    seconds: float
    least: float
    needs: tuple[str, ...] = ()
    waits: bool = False


_RUNS = ("nvidia.dali", "fire", "tqdm", "tensorboard")
# In order of importance. On an H200 with 16 cores, the first six take about 410 s, and the seventh 170 s.
STAGES = {
    "machine": Stage(45, 10),
    "decoder": Stage(120, 15, ("nvidia.dali",)),
    "eager": Stage(130, 20),
    "train": Stage(170, 60, _RUNS, waits=True),
    "tests": Stage(100, 20, ("pytest",), waits=True),
    "stream": Stage(60, 10, ("pytest", "nvidia.dali", "sklearn"), waits=True),
    "loader": Stage(220, 30, ("nvidia.dali",), waits=True),
    "reproduce": Stage(160, 125, (*_RUNS, "sklearn"), waits=True),
    "grid": Stage(80, 15),
    "compiled": Stage(150, 40),
    "nccl": Stage(45, 10, ("pytest",)),
    "train_compiled": Stage(240, 90, _RUNS, waits=True),
    "doctor": Stage(60, 10, ("fire",)),
    "large": Stage(40, 10),
    "export": Stage(60, 10, ("fire", "safetensors")),
    "resume": Stage(120, 25, (*_RUNS, "sklearn"), waits=True),
    "placements": Stage(600, 60, _RUNS, waits=True),
    "compile_tests": Stage(150, 30, ("pytest",)),
}
PREPARE = Stage(120, 0)


@dataclass
class Session:
    """One run of stages.

    Attributes:
        out: folder of the results.
        dry: whether this is a dry run on the CPU.
        seconds: time limit of all stages together.
        result: content of OUT/gpu.json.
        started: start, by `time.monotonic()`.

    """

    out: Path
    dry: bool
    seconds: float
    result: dict[str, Any]
    started: float = field(default_factory=time.monotonic)
    _codes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Remaining seconds."""
        return self.seconds - (time.monotonic() - self.started)

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the stages: separate caches, as on a fresh machine, and in a dry run only the CPU."""
        cache = self.out / "cache"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        own = {
            "PYTHONPATH": path,
            "XDG_CACHE_HOME": str(cache),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONUNBUFFERED": "1",
        }
        if self.dry:
            own |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
        return {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"} | own

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Start the process of a stage."""
        (self.out / f"{name}.json").unlink(missing_ok=True)
        self._codes[name] = code_version()  # per stage: --only may add stages of another commit
        return self._spawn(name)

    def _spawn(self, name: str) -> subprocess.Popen[bytes]:
        words = [
            sys.executable,
            "-m",
            "benchmarks.on_gpu.stages",
            name,
            str(self.out),
            *(["--dry"] if self.dry else []),
        ]
        with open(self.out / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                words,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def close(self, name: str, state: str, why: str, seconds: float) -> None:
        """Record a stage's end state with all its measurements, and print it."""
        measured = self.measured(name)
        about = {"state": state, "why": why, "seconds": round(seconds, 1), "measured": measured}
        about |= self._codes.get(name, {})
        write_json(self.out / f"{name}.json", {"stage": name, **about})
        self.result["stages"][name] = about
        self.result["goals"] = [row._asdict() for row in rows(self.result)]
        if "environment" in measured:
            self.result["environment"] = measured["environment"]
        write_json(self.out / "gpu.json", self.result)
        print(f"{name:<14} {state:<15} {seconds:5.1f} s, {max(self.left, 0):4.0f} s left  {why}".rstrip(), flush=True)

    def measured(self, name: str) -> dict[str, Any]:
        """The measurements that a stage has written so far."""
        try:
            found: dict[str, Any] = json.loads((self.out / f"{name}.json").read_text(encoding="utf-8"))["measured"]
        except (OSError, ValueError, KeyError):
            return {}
        return without_places(found, {self.out: "OUT", ROOT: "CHECKOUT", Path(sys.prefix): "PYTHON"})


def without_places(measured: dict[str, Any], names: dict[Path, str]) -> dict[str, Any]:
    """Measurements with this machine's folders replaced by names; inner folders must come first."""
    text = json.dumps(measured)
    for folder, name in names.items():
        text = text.replace(str(folder), name)
    found: dict[str, Any] = json.loads(text)
    return found


def run_stage(session: Session, name: str, stage: Stage) -> None:
    """Run a stage to its end or time-out."""
    begun = time.monotonic()
    limit = min(stage.seconds * (DRY_FACTOR if session.dry else 1), session.left)
    if sys.stdout.isatty():  # replaced by the line of `close`
        print(f"{name:<14} running, for {limit:.0f} s at most", end="\r", flush=True)
    process = session.start(name)
    why = "interrupted"
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        why = f"took longer than {limit:.0f} s"
    finally:
        if process.poll() is None:
            end(process)
            session.close(name, "cut off", why, time.monotonic() - begun)
        else:
            session.close(name, *outcome(process.returncode, session.measured(name)), time.monotonic() - begun)


def outcome(status: int, measured: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """(state, reason) of a process that has ended."""
    tests = [figures for figures in measured.values() if "outcome" in figures]
    if tests and all(figures["outcome"] == "skipped" for figures in tests):
        return "skipped", str(tests[0].get("why", "")).removeprefix("Skipped: ")
    errors = [f"{name}: {figures['error']}" for name, figures in measured.items() if "error" in figures]
    skipped = [f"{name}: {figures['skipped']}" for name, figures in measured.items() if "skipped" in figures]
    if errors:
        return "failed", "; ".join(errors[:3]) + (f" (and {len(errors) - 3} more)" if len(errors) > 3 else "")
    if status:
        return "failed", f"its process ended with exit status {status}; see its log"
    if skipped and len(skipped) == len(measured):
        return "skipped", skipped[0].partition(": ")[2]
    notes = [figures["note"] for figures in measured.values() if "note" in figures]
    return "ok", "; ".join([*notes, *skipped])


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all its descendants, even those in other sessions."""
    family = [process.pid, *descendants(process.pid)]
    born = {pid: _stat(pid)[1] for pid in family}
    for number, patience in ((signal.SIGTERM, TERM_SEC), (signal.SIGKILL, TERM_SEC)):
        for pid in family:
            if born[pid] and _stat(pid)[1] == born[pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and (
            process.poll() is None or any(born[pid] and _stat(pid)[1] == born[pid] for pid in family[1:])
        ):
            time.sleep(0.05)
    process.poll()  # does not wait: a driver may block its end for ever


def descendants(pid: int) -> Iterator[int]:
    """PIDs of all descendants of a process."""
    parents = {int(entry.name): _stat(int(entry.name))[0] for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    yield from found[1:]


def _stat(pid: int) -> tuple[int, str]:
    """(parent, start time) of a living process; (0, "") of others."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return (0, "") if words[0] == "Z" else (int(words[1]), words[19])


def missing_packages(session: Session, names: Iterable[str]) -> dict[str, str]:
    """Packages that cannot be imported, with the reason. Each is tried in its own process, since it may crash."""
    children = {
        name: subprocess.Popen(
            [sys.executable, "-c", f"import {name}"],
            env=session.environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    found = {}
    for name, child in children.items():
        try:
            _, said = child.communicate(timeout=IMPORT_SEC)
        except subprocess.TimeoutExpired:
            child.kill()
            found[name] = f"import takes longer than {IMPORT_SEC:.0f} s"
            continue
        if child.returncode:
            found[name] = (said.strip().splitlines() or [f"import ended with exit status {child.returncode}"])[-1][:200]
    return found


def obstacle(session: Session) -> str:
    """Why nothing can be measured with this Python, and what to do; "" if there is no obstacle."""
    code = "import torch; print(torch.cuda.is_available())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=session.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=IMPORT_SEC,
        )
    except subprocess.TimeoutExpired:
        return f"importing torch with {sys.executable} takes longer than {IMPORT_SEC:g} s: nothing was run"
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return (
            f"torch cannot be imported by {sys.executable} ({why}): nothing was run. Give the Python of your "
            f"environment: benchmarks/gpu.sh OUT PYTHON"
        )
    if session.dry or done.stdout.strip().endswith("True"):
        return ""
    return f"torch in {sys.executable} finds no GPU: nothing was run. Use --dry to run on the CPU"


def go(session: Session, names: list[str]) -> None:
    """Run the stages in order."""
    waited_for = any(STAGES[name].waits for name in names)
    preparing: subprocess.Popen[bytes] | None = session.start("prepare") if waited_for else None
    begun = time.monotonic()
    try:
        missing = missing_packages(session, dict.fromkeys(need for name in names for need in STAGES[name].needs))
        session.result["missing"] = missing
        for package, why in missing.items():
            print(f"missing package: {package} ({why}). Stages that need it are skipped", flush=True)
        for name in names:
            stage = STAGES[name]
            lacks = [need for need in stage.needs if need in missing]
            if lacks:
                session.close(name, "skipped", f"needs {' and '.join(lacks)}", 0.0)
                continue
            if preparing is not None and (stage.waits or preparing.poll() is not None):
                _prepared(session, preparing, begun)
                preparing = None
            if session.left < stage.least:
                session.close(name, "not run: time", f"run later: --only {name}", 0.0)
                continue
            run_stage(session, name, stage)
        if preparing is not None:
            _prepared(session, preparing, begun)
    finally:
        if preparing is not None and preparing.poll() is None:
            end(preparing)


def _prepared(session: Session, process: subprocess.Popen[bytes], begun: float) -> None:
    """Wait for the stage `prepare`, which runs in the background."""
    try:
        process.wait(max(0.0, min(PREPARE.seconds * (DRY_FACTOR if session.dry else 1), session.left)))
    except subprocess.TimeoutExpired:
        end(process)
        session.close("prepare", "cut off", "took too long", time.monotonic() - begun)
        return
    session.close("prepare", *outcome(process.returncode, session.measured("prepare")), time.monotonic() - begun)


def _positive(text: str) -> float:
    """A number of seconds above 0."""
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: must be a number of seconds above 0")


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        usage="%(prog)s [--dry] [--seconds SECONDS] [--only STAGE,...] OUT [PYTHON]",
        description="All GPU tests and measurements, in minutes. PYTHON: .venv/bin/python by default, if it exists.",
    )
    parser.add_argument("out", metavar="OUT", help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="run every stage on the CPU, with tiny sizes")
    parser.add_argument(
        "--seconds",
        type=_positive,
        help=f"time limit of all stages; default {SECONDS:.0f}, with --dry {DRY_SECONDS:.0f}",
    )
    parser.add_argument("--only", default="", metavar="STAGE,...", help=f"run only these stages of {', '.join(STAGES)}")
    asked = parser.parse_args(words)
    asked.only = [name for name in asked.only.split(",") if name]
    unknown = [name for name in asked.only if name not in STAGES]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: unknown stage. Choose from {', '.join(STAGES)}")
    if asked.seconds is None:
        asked.seconds = DRY_SECONDS if asked.dry else SECONDS
    return asked


def opened(asked: argparse.Namespace) -> Session:
    """A session; with --only, it continues the results in OUT.

    Raises:
        SystemExit: if results in OUT would be lost.

    """
    out = Path(asked.out).resolve()
    file = out / "gpu.json"
    result: dict[str, Any] = {}
    if out.is_file():
        raise SystemExit(f"OUT {out}: is a file. Choose a folder")
    if file.exists():
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            holds = f"{'a dry run' if result['dry'] else 'measurements'} of {result['started']}"
        except (OSError, ValueError, KeyError, TypeError):
            raise SystemExit(f"{file} cannot be read. Choose another folder, or remove it") from None
        if not asked.only:
            raise SystemExit(
                f"{file} contains {holds}. Add stages to it with --only STAGE,..., or choose another folder"
            )
        if result["dry"] != asked.dry:
            raise SystemExit(f"{file} contains {holds}. Choose another folder")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    new = {"dry": asked.dry, "started": now, "environment": {}, "missing": {}, "goals": [], "stages": {}}
    return Session(out, asked.dry, asked.seconds, {**new, **result})


def main(words: list[str]) -> int:
    """Run the requested stages; returns 1 if a stage failed or was cut off, or there is no GPU."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    asked = parse(words)
    session = opened(asked)
    if why := obstacle(session):
        print(why, file=sys.stderr)
        return 1
    session.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in STAGES if not asked.only or name in asked.only]
    try:
        go(session, names)
    except KeyboardInterrupt:
        left = ",".join(name for name in names if session.result["stages"].get(name, {}).get("state") != "ok")
        print(f"interrupted. Run the rest later: --only {left}", flush=True)
        return 128 + signal.SIGINT
    finally:
        print("\n" + "\n".join(table(session.result)), flush=True)
        print(f"written to {session.out / 'gpu.json'}", flush=True)
    states = [session.result["stages"][name]["state"] for name in names]
    return 1 if {"failed", "cut off"} & set(states) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
