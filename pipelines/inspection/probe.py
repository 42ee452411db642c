"""Choose the decoding that gives correct pixels on this machine, by trials in child processes.

Decoding on a GPU depends on a stack: card, driver, nvImageCodec, nvJPEG, JPEG engine. Some combinations fail with an
error, crash, hang, or return wrong pixels. So each rung of `pipelines.placement.RUNGS`, fastest first, decodes
specimens in a child process (`pipelines.inspection.probe_child`), which compares them with decoding on the CPU. The
first correct rung is chosen. The last one, the CPU, needs no trial. Results are cached by machine and versions.

    python -m fast_spatial.pipelines.inspection.probe [--all] [--hw-load SHARE] [--timeout SEC]

prints a line of JSON for each rung that it tries. `--all` tries every rung, even after a correct one and without a
GPU. This command neither reads nor writes the cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fast_spatial.errors import UserError
from fast_spatial.kernels.host import environment_of_children, one_at_a_time, recall, remember
from fast_spatial.pipelines.inspection.specimens import FAR, MOST_FAR_SHARE, MOST_MEAN, Difference
from fast_spatial.pipelines.nvml import gpus_and_driver
from fast_spatial.pipelines.placement import HW_DECODER_LOAD, RUNGS, Decoding

TIMEOUT_SEC = 60.0
# The child ends itself at its time-out; if it hangs, it is killed this much later.
_GRACE_SEC = 3.0
_PACKAGES = ("torch", *(f"nvidia-{name}-cu{kind}" for name in ("dali", "nvimgcodec") for kind in ("12", "13")))
_PACKAGES += ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-nvjpeg", "nvidia-nvjpeg-cu12")
# Packages that make the specimens and the reference; torchvision also ships an nvJPEG.
_PACKAGES += ("torchvision", "numba", "numpy", "pillow")
_SOURCES = ("decoding.py", "probe.py", "probe_child.py", "specimens.py", "../nvjpeg.py", "../ops.py", "../placement.py")
# nvImageCodec prints this for every image, and then decodes it on the CPU.
_UNTRUSTED = "may produce wrong results"
_IS_UNTRUSTED = "nvImageCodec warns of wrong regions with this nvJPEG (13.2 is needed)"
# Faults of the stack itself are cached for good. Any other may be caused by another process, and expires after
# _PASSING_SEC.
_LASTING = re.compile(rf"wrong pixels|{re.escape(_IS_UNTRUSTED)}|crashed \((SIGSEGV|SIGABRT|SIGBUS|SIGILL|SIGFPE)\)")
_PASSING_SEC = 3600.0
_STDERR_CHARS = 4000
_REASON_CHARS = 240

# (rung, time-out in seconds) -> the command of a child that tries it.
Command = Callable[[Decoding, float], Sequence[str]]


@dataclass(frozen=True)
class Trial:
    """Result of trying a rung.

    Attributes:
        decoding: the rung.
        fault: why it must not be used; "" if its pixels are correct.
        worst_mean: largest mean difference of an image from decoding on the CPU, in 1/255; None if not measured.
        worst_far_share: largest share of an image's pixels that differ by more than 16/255; None if not measured.
        images: number of regions compared.
        seconds: run time of the child.
        remembered: whether the result comes from the cache.

    """

    decoding: Decoding
    fault: str
    worst_mean: float | None
    worst_far_share: float | None
    images: int
    seconds: float
    remembered: bool = False


@dataclass(frozen=True)
class Choice:
    """The chosen decoding, the reason, and all trials."""

    decoding: Decoding
    why: str
    trials: tuple[Trial, ...] = ()

    @property
    def message(self) -> str:
        """One line for the user."""
        return f"decoding: {self.decoding} ({self.why})"

    def to_json(self) -> dict[str, Any]:
        """JSON for records: the choice, its reason, and every trial's values."""
        return {"decoding": asdict(self.decoding), "why": self.why, "trials": [asdict(trial) for trial in self.trials]}


def choose(
    wanted: str,
    *,
    on_gpu: bool,
    hw_decoder_load: float,
    command: Command | None = None,
    timeout_sec: float = TIMEOUT_SEC,
) -> Choice:
    """The decoding to use.

    Args:
        wanted: "auto" chooses the first correct rung. The name of a decoder (`placement.DECODERS`) chooses it without a
            trial; "gpu" then uses `hw_decoder_load`.
        on_gpu: whether views are needed on a GPU.
        hw_decoder_load: share of a batch for the JPEG engine; 0 skips its rung.
        command: command of the children; default `probe_child`.
        timeout_sec: time-out of each child.

    Raises:
        UserError: if the decoder needs a GPU and there is none.

    """
    if wanted != "auto":
        if wanted != "cpu" and not on_gpu:
            raise UserError(f"--decode {wanted} needs a GPU, but torch finds none", "remove it, or use --decode cpu")
        return Choice(Decoding(wanted, hw_decoder_load if wanted == "gpu" else 0.0), "as requested, not probed")
    if not on_gpu:
        return Choice(Decoding("cpu"), "no GPU in use")
    engine = [Decoding("gpu", hw_decoder_load)] if hw_decoder_load else []
    trials: list[Trial] = []
    with one_at_a_time("decoder-probe"):
        about = _about()
        for rung in [*engine, *(rung for rung in RUNGS if not rung.hw_decoder_load and rung.on != "cpu")]:
            trials.append(_recalled(rung, about) or _try_and_remember(rung, about, command or _command, timeout_sec))
            if not trials[-1].fault:
                return Choice(rung, _why(trials), tuple(trials))
    return Choice(Decoding("cpu"), _why(trials), tuple(trials))


def _why(trials: list[Trial]) -> str:
    """The measurements of the correct rung, and the faults of the rungs before it."""
    said = [f"not {trial.decoding}: {trial.fault}" for trial in trials if trial.fault]
    if not trials[-1].fault:
        said.insert(0, f"{'probed earlier' if trials[-1].remembered else 'probed'}: {_values(trials[-1])}")
    return "; ".join(said)


def _values(trial: Trial) -> str:
    return f"at most {trial.worst_mean:.2f}/255 from the CPU, {trial.worst_far_share:.2%} of pixels beyond {FAR}/255"


# --- the cache


def _about() -> dict[str, Any]:
    """The cache key: the machine's GPUs, those in use, driver, versions of packages and of our code."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    versions = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {**_gpus(), "visible": visible, "versions": versions, "code": digest.hexdigest()[:16]}


def _gpus() -> dict[str, Any]:
    """The models of the machine's GPUs, and their driver; without one, the name of the host."""
    names, driver = gpus_and_driver() or ([], f"of {platform.node()}")
    return {"gpus": sorted(set(names)), "driver": driver}


def _file(rung: Decoding, about: dict[str, Any]) -> str:
    key = json.dumps([asdict(rung), about], sort_keys=True)
    return f"decoder-probe-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _recalled(rung: Decoding, about: dict[str, Any]) -> Trial | None:
    kept = recall(_file(rung, about))
    try:
        trial = Trial(rung, str(kept["fault"]), **_measured(kept), seconds=float(kept["seconds"]), remembered=True)
        at = float(kept["at"])
    except (TypeError, KeyError, ValueError):
        return None
    if not trial.fault and trial.worst_mean is None:
        return None
    return trial if _lasts(trial.fault) or 0 <= time.time() - at <= _PASSING_SEC else None


def _lasts(fault: str) -> bool:
    """Whether a fault is one of the stack itself; libraries also abort when memory is short."""
    return not fault or (bool(_LASTING.match(fault)) and "out of memory" not in fault)


def _try_and_remember(rung: Decoding, about: dict[str, Any], command: Command, timeout_sec: float) -> Trial:
    trial, *_ = try_rung(rung, command=command, timeout_sec=timeout_sec)
    remember(_file(rung, about), {**asdict(trial), "about": about, "at": time.time()})
    return trial


# --- the child


def _command(rung: Decoding, timeout_sec: float) -> Sequence[str]:
    words = [rung.on, str(rung.hw_decoder_load), str(timeout_sec)]
    return [sys.executable, "-m", "fast_spatial.pipelines.inspection.probe_child", *words]


def try_rung(
    rung: Decoding, *, command: Command = _command, timeout_sec: float = TIMEOUT_SEC
) -> tuple[Trial, str, str]:
    """Try a rung in a child; returns the trial and the ends of the child's stdout and stderr."""
    started = time.monotonic()
    # Files, not pipes: a grandchild may hold a pipe open, and a full pipe would block the child.
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = subprocess.Popen(
            command(rung, timeout_sec),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            process_group=0,  # to kill it with its descendants; Ctrl-C reaches the parent alone
            env=environment_of_children(),
        )
        try:
            status = child.wait(timeout_sec + _GRACE_SEC)
        except subprocess.TimeoutExpired:
            status = -signal.SIGALRM
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a driver may block its end for ever
                child.wait(_GRACE_SEC)
        said, complaints = _end_of(stdout), _end_of(stderr)
    trial = _judge(rung, status, said, complaints, timeout_sec)
    return replace(trial, seconds=round(time.monotonic() - started, 1)), said, complaints


def _end_of(file: Any) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _STDERR_CHARS))
    return str(file.read().decode(errors="replace")).strip()


def _judge(rung: Decoding, status: int, said: str, complaints: str, timeout_sec: float) -> Trial:
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    hint = f": {_short(lines[-1])}" if lines else ""
    answer = _answer(said)
    if _UNTRUSTED in said + complaints:
        return Trial(rung, _IS_UNTRUSTED, None, None, 0, 0.0)
    if status == -signal.SIGALRM:
        return Trial(rung, f"no answer within {timeout_sec:g} s", None, None, 0, 0.0)
    if status < 0:
        name = signal.Signals(-status).name if -status in signal.valid_signals() else f"signal {-status}"
        return Trial(rung, f"crashed ({name}){hint}", None, None, 0, 0.0)
    if status > 0:
        return Trial(rung, f"ended with exit status {status}{hint}", None, None, 0, 0.0)
    if answer is None:
        return Trial(rung, "invalid answer", None, None, 0, 0.0)
    fault, measured = _short(str(answer.get("fault", ""))), _measured(answer)
    if not fault:
        mean, share = measured["worst_mean"], measured["worst_far_share"]
        if mean is None or share is None or not measured["images"]:
            fault = "invalid answer"
        elif not Difference(mean, share).is_right:
            fault = f"wrong pixels: mean difference {mean:.2f}/255 (at most {MOST_MEAN:g}), {share:.2%} of pixels "
            fault += f"beyond {FAR}/255 (at most {MOST_FAR_SHARE:.0%})"
    return Trial(rung, fault, **measured, seconds=0.0)


def _short(reason: str) -> str:
    return reason if len(reason) <= _REASON_CHARS else f"{reason[:_REASON_CHARS]}..."


def _answer(said: str) -> dict[str, Any] | None:
    try:
        answer = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return answer if isinstance(answer, dict) else None


def _measured(answer: dict[str, Any]) -> dict[str, Any]:
    """The numbers of an answer; invalid ones become None, or 0 images."""
    mean, share, images = (answer.get(name) for name in ("worst_mean", "worst_far_share", "images"))
    return {
        "worst_mean": float(mean) if isinstance(mean, (int, float)) and math.isfinite(mean) else None,
        "worst_far_share": float(share) if isinstance(share, (int, float)) and math.isfinite(share) else None,
        "images": images if isinstance(images, int) else 0,
    }


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fast_spatial.pipelines.inspection.probe", description="Try the decoders of this machine."
    )
    parser.add_argument("--all", action="store_true", help="try every rung, even after a correct one and without a GPU")
    parser.add_argument("--hw-load", type=float, default=HW_DECODER_LOAD, help="share of a batch for the JPEG engine")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SEC, help="time-out of each rung in seconds")
    options = parser.parse_args()
    about = _about()
    print(json.dumps({"about": about}), flush=True)
    trials: list[Trial] = []
    rungs = [replace(rung, hw_decoder_load=options.hw_load if rung.hw_decoder_load else 0.0) for rung in RUNGS]
    if not (about["gpus"] or options.all):
        print("no GPU is visible, so files are decoded on the CPU; --all tries every rung", file=sys.stderr, flush=True)
        rungs = rungs[-1:]
    for rung in rungs:
        trial, said, complaints = try_rung(rung, timeout_sec=options.timeout)
        trials.append(trial)
        result = trial.fault or f"right: {_values(trial)}"
        kinds = (_answer(said) or {}).get("kinds", {})
        line = {"rung": str(rung), "result": result, **asdict(trial), "kinds": kinds, "stderr": complaints}
        print(json.dumps(line), flush=True)
        if not (trial.fault or options.all):
            break
    right = next((trial for trial in trials if not trial.fault), None)
    print(json.dumps({"decoding": str(right.decoding) if right else None}), flush=True)
    if right is None:  # even the CPU failed
        raise SystemExit(1)


if __name__ == "__main__":
    _main()
