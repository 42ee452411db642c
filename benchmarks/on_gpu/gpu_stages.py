"""All GPU checks and measurements in stages that cannot stop each other: what `benchmarks/gpu.sh` runs.

    python -m benchmarks.on_gpu.gpu_stages [--dry] [--seconds 480] [--only STAGE,...] OUT

Each stage is a process with a time-out and leaves OUT/STAGE.json and OUT/STAGE.log; OUT/gpu.json holds all of them and
is rewritten after each. What no longer fits the time is listed, and `--only` runs it later. Needs Python alone: a
package that is missing or broken here is a finding.
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
DRY_FACTOR = 8  # what takes a GPU and 16 cores a second may take two cores several
IMPORT_SEC = 90.0
TERM_SEC = 5.0


@dataclass(frozen=True)
class Stage:
    """A stage: how long it may take, what has to be left for it to be begun, what it needs besides torch.

    Attributes:
        seconds: its time-out.
        least: seconds that have to be left.
        needs: packages.
        waits: whether the synthetic images and numba's kernels have to be made before.

    """

    seconds: float
    least: float
    needs: tuple[str, ...] = ()
    waits: bool = False


_RUNS = ("nvidia.dali", "fire", "tqdm", "tensorboard")
# In order of worth; on an H200 with 16 cores the first five take about 390 s.
STAGES = {
    "machine": Stage(45, 10),
    "decoder": Stage(120, 15, ("nvidia.dali",)),
    "eager": Stage(130, 20),
    "train": Stage(150, 60, _RUNS, waits=True),
    "loader": Stage(220, 30, ("nvidia.dali",), waits=True),
    "stream": Stage(60, 10, ("pytest", "nvidia.dali", "sklearn"), waits=True),
    "compiled": Stage(150, 40),
    "tests": Stage(100, 20, ("pytest",), waits=True),
    "nccl": Stage(45, 10, ("pytest",)),
    "train_compiled": Stage(240, 90, _RUNS, waits=True),
    "doctor": Stage(60, 10, ("fire",)),
    "grid": Stage(80, 15),
    "large": Stage(40, 10),
    "export": Stage(60, 10, ("fire", "safetensors")),
    "resume": Stage(120, 25, (*_RUNS, "sklearn"), waits=True),
    "reproduce": Stage(160, 125, (*_RUNS, "sklearn"), waits=True),
    "placements": Stage(600, 60, _RUNS, waits=True),
    "compile_tests": Stage(150, 30, ("pytest",)),
}
PREPARE = Stage(120, 0)


@dataclass
class Session:
    """A go through the stages.

    Attributes:
        out: the folder of results.
        dry: a trial on the CPU.
        seconds: for all of it.
        result: what OUT/gpu.json holds.
        started: of `time.monotonic()`.

    """

    out: Path
    dry: bool
    seconds: float
    result: dict[str, Any]
    started: float = field(default_factory=time.monotonic)
    _codes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self.started)

    @property
    def environment(self) -> dict[str, str]:
        """What stages inherit: caches of their own, so that a fresh machine does, and on a trial the CPU alone."""
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
        """Begin a stage."""
        (self.out / f"{name}.json").unlink(missing_ok=True)
        self._codes[name] = code_version()  # a file that goes on with another is of several
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
        """Keep how a stage ended, with all that it had measured, and say so."""
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
        """What a stage has written so far."""
        try:
            found: dict[str, Any] = json.loads((self.out / f"{name}.json").read_text(encoding="utf-8"))["measured"]
        except (OSError, ValueError, KeyError):
            return {}
        return without_places(found, {self.out: "OUT", ROOT: "CHECKOUT", Path(sys.prefix): "PYTHON"})


def without_places(measured: dict[str, Any], names: dict[Path, str]) -> dict[str, Any]:
    """Measurements in which folders of this machine, the innermost first, are called by a name."""
    text = json.dumps(measured)
    for folder, name in names.items():
        text = text.replace(str(folder), name)
    found: dict[str, Any] = json.loads(text)
    return found


def run_stage(session: Session, name: str, stage: Stage) -> None:
    """Run a stage to its end, or to its time-out."""
    begun = time.monotonic()
    limit = min(stage.seconds * (DRY_FACTOR if session.dry else 1), session.left)
    if sys.stdout.isatty():  # its line follows when it ends
        print(f"{name:<14} running, for {limit:.0f} s at most", end="\r", flush=True)
    process = session.start(name)
    why = "this program was stopped"
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        why = f"it took longer than {limit:.0f} s"
    finally:
        if process.poll() is None:
            end(process)
            session.close(name, "cut off", why, time.monotonic() - begun)
        else:
            session.close(name, *outcome(process.returncode, session.measured(name)), time.monotonic() - begun)


def outcome(status: int, measured: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """(state, why) of a process that ended."""
    tests = [figures for figures in measured.values() if "outcome" in figures]
    if tests and all(figures["outcome"] == "skipped" for figures in tests):
        return "skipped", str(tests[0].get("why", "")).removeprefix("Skipped: ")
    errors = [f"{name}: {figures['error']}" for name, figures in measured.items() if "error" in figures]
    skipped = [f"{name}: {figures['skipped']}" for name, figures in measured.items() if "skipped" in figures]
    if errors:
        return "failed", "; ".join(errors[:3]) + (f" (and {len(errors) - 3} more)" if len(errors) > 3 else "")
    if status:
        return "failed", f"its process ended with status {status}; see its log"
    if skipped and len(skipped) == len(measured):
        return "skipped", skipped[0].partition(": ")[2]
    notes = [figures["note"] for figures in measured.values() if "note" in figures]
    return "ok", "; ".join([*notes, *skipped])


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started, sessions of their own included."""
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
    process.poll()  # a driver may hold it for ever


def descendants(pid: int) -> Iterator[int]:
    """The processes that one started, and those that they did."""
    parents = {int(entry.name): _stat(int(entry.name))[0] for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    yield from found[1:]


def _stat(pid: int) -> tuple[int, str]:
    """(parent, start time) of a process that lives; (0, "") of others."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0, ""
    return (0, "") if words[0] == "Z" else (int(words[1]), words[19])


def missing_packages(session: Session, names: Iterable[str]) -> dict[str, str]:
    """Which packages cannot be imported, and why; each in a process of its own, for a broken one may crash."""
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
            found[name] = f"its import takes longer than {IMPORT_SEC:.0f} s"
            continue
        if child.returncode:
            found[name] = (said.strip().splitlines() or [f"its import ended with status {child.returncode}"])[-1][:200]
    return found


def obstacle(session: Session) -> str:
    """Why nothing can be measured with this Python, and what to do; "" if something can."""
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
        return f"torch in {sys.executable} does not say within {IMPORT_SEC:g} s whether there is a GPU: nothing was run"
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return (
            f"torch cannot be imported by {sys.executable} ({why}): nothing was run; name the Python of your "
            f"environment: benchmarks/gpu.sh OUT PYTHON"
        )
    if session.dry or done.stdout.strip().endswith("True"):
        return ""
    return f"no GPU is visible to torch in {sys.executable}: nothing was run; try it on the CPU with --dry"


def go(session: Session, names: list[str]) -> None:
    """All stages, in turn."""
    waited_for = any(STAGES[name].waits for name in names)
    preparing: subprocess.Popen[bytes] | None = session.start("prepare") if waited_for else None
    begun = time.monotonic()
    try:
        missing = missing_packages(session, dict.fromkeys(need for name in names for need in STAGES[name].needs))
        session.result["missing"] = missing
        for package, why in missing.items():
            print(f"missing here: {package} ({why}); what needs it is skipped", flush=True)
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
                session.close(name, "not run: time", f"later: --only {name}", 0.0)
                continue
            run_stage(session, name, stage)
        if preparing is not None:
            _prepared(session, preparing, begun)
    finally:
        if preparing is not None and preparing.poll() is None:
            end(preparing)


def _prepared(session: Session, process: subprocess.Popen[bytes], begun: float) -> None:
    """Wait for what is made in the background."""
    try:
        process.wait(max(0.0, min(PREPARE.seconds * (DRY_FACTOR if session.dry else 1), session.left)))
    except subprocess.TimeoutExpired:
        end(process)
        session.close("prepare", "cut off", "it took too long", time.monotonic() - begun)
        return
    session.close("prepare", *outcome(process.returncode, session.measured("prepare")), time.monotonic() - begun)


def _positive(text: str) -> float:
    """A number of seconds above 0."""
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        usage="%(prog)s [--dry] [--seconds SECONDS] [--only STAGE,...] OUT [PYTHON]",
        description="All GPU checks and measurements, in minutes, with PYTHON: .venv/bin/python if there is one.",
    )
    parser.add_argument("out", metavar="OUT", help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="every stage on the CPU, with tiny sizes")
    parser.add_argument(
        "--seconds", type=_positive, help=f"for all of it; default {SECONDS:.0f}, with --dry {DRY_SECONDS:.0f}"
    )
    parser.add_argument("--only", default="", metavar="STAGE,...", help=f"these stages alone, of {', '.join(STAGES)}")
    asked = parser.parse_args(words)
    asked.only = [name for name in asked.only.split(",") if name]
    unknown = [name for name in asked.only if name not in STAGES]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: choose among {', '.join(STAGES)}")
    if asked.seconds is None:
        asked.seconds = DRY_SECONDS if asked.dry else SECONDS
    return asked


def opened(asked: argparse.Namespace) -> Session:
    """A session; with --only it goes on with what OUT holds.

    Raises:
        SystemExit: if OUT holds something that would be lost.

    """
    out = Path(asked.out).resolve()
    file = out / "gpu.json"
    result: dict[str, Any] = {}
    if out.is_file():
        raise SystemExit(f"OUT {out}: it is a file; name a folder")
    if file.exists():
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            holds = f"{'a dry run' if result['dry'] else 'measurements'} of {result['started']}"
        except (OSError, ValueError, KeyError, TypeError):
            raise SystemExit(f"{file} cannot be read; name another folder, or remove it") from None
        if not asked.only:
            raise SystemExit(f"{file} holds {holds}; --only STAGE,... adds to it, or name another folder")
        if result["dry"] != asked.dry:
            raise SystemExit(f"{file} holds {holds}; name another folder")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    new = {"dry": asked.dry, "started": now, "environment": {}, "missing": {}, "goals": [], "stages": {}}
    return Session(out, asked.dry, asked.seconds, {**new, **result})


def main(words: list[str]) -> int:
    """Run what was asked for: 1 if a stage failed or was cut off, or there is no GPU."""
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
        print(f"stopped; later: --only {left}", flush=True)
        return 128 + signal.SIGINT
    finally:
        print("\n" + "\n".join(table(session.result)), flush=True)
        print(f"written to {session.out / 'gpu.json'}", flush=True)
    states = [session.result["stages"][name]["state"] for name in names]
    return 1 if {"failed", "cut off"} & set(states) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
