"""Which decoding gives right pixels on this machine: tried in child processes before it is relied on.

Decoding on a GPU depends on a stack (card, driver, nvImageCodec, nvJPEG, the JPEG engine) of which some combinations
fail with an error, crash, hang, or return wrong pixels. So each rung of `pipelines.placement.RUNGS`, from the fastest
on, decodes specimens in a child process (`pipelines.inspection.probe_child`), which compares them with decoding on the
CPU; the first that is right is taken, and the last, the CPU, needs no trial. What was found is remembered, by machine
and versions.

    python -m fast_spatial.pipelines.inspection.probe [--all] [--hw-load SHARE] [--timeout SEC]

prints a line of JSON for each rung that it tries; `--all` tries every rung, after one that is right and without a GPU,
too. It remembers nothing.
"""

from __future__ import annotations

import argparse
import ctypes
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
from fast_spatial.pipelines.placement import HW_DECODER_LOAD, RUNGS, Decoding

TIMEOUT_SEC = 60.0
# The child ends itself at its time-out; one that cannot is killed a little later.
_GRACE_SEC = 3.0
_PACKAGES = ("torch", *(f"nvidia-{name}-cu{kind}" for name in ("dali", "nvimgcodec") for kind in ("12", "13")))
_PACKAGES += ("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-nvjpeg", "nvidia-nvjpeg-cu12")
# What the specimens, and what they are compared with, are made with; torchvision brings an nvJPEG, too.
_PACKAGES += ("torchvision", "numba", "numpy", "pillow")
_SOURCES = ("decoding.py", "probe.py", "probe_child.py", "specimens.py", "../nvjpeg.py", "../ops.py", "../placement.py")
# nvImageCodec says so of every image, and then has the CPU decode it.
_UNTRUSTED = "may produce wrong results"
_IS_UNTRUSTED = "nvImageCodec warns of wrong regions with this nvJPEG (13.2 is needed)"
# Faults of the stack itself. Any other may be another process's doing, and is not believed for longer than this.
_LASTING = re.compile(rf"wrong pixels|{re.escape(_IS_UNTRUSTED)}|it crashed \((SIGSEGV|SIGABRT|SIGBUS|SIGILL|SIGFPE)\)")
_PASSING_SEC = 3600.0
_STDERR_CHARS = 4000
_REASON_CHARS = 240

# The command of a child that tries a rung for so many seconds.
Command = Callable[[Decoding, float], Sequence[str]]


@dataclass(frozen=True)
class Trial:
    """What a child found about a rung.

    Attributes:
        decoding: the rung.
        fault: why it is not to be used, in words; "" if its pixels are right.
        worst_mean: the largest mean difference of an image from decoding on the CPU, in 1/255; None if not measured.
        worst_far_share: the largest share of an image's pixels beyond 16/255.
        images: regions compared.
        seconds: how long the child ran.
        remembered: found earlier.

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
    """The decoding to use, why, and what was tried before it was chosen."""

    decoding: Decoding
    why: str
    trials: tuple[Trial, ...] = ()

    @property
    def message(self) -> str:
        """One line for the user."""
        return f"decoding: {self.decoding} ({self.why})"

    def to_json(self) -> dict[str, Any]:
        """For records: the choice, its reason, and every trial's values."""
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
        wanted: "auto" takes the first rung that is right; the name of a decoder (`placement.DECODERS`) takes that one,
            not probed: "gpu" with the JPEG engine's share as given.
        on_gpu: whether views are wanted on a GPU.
        hw_decoder_load: share of a batch for the JPEG engine; 0 leaves out its rung.
        command: of the children; default this project's.
        timeout_sec: for each child.

    Raises:
        UserError: if a decoder is wanted that needs a GPU, where there is none.

    """
    if wanted != "auto":
        if wanted != "cpu" and not on_gpu:
            raise UserError(f"--decode {wanted} needs a GPU, and torch sees none", "leave it out, or say --decode cpu")
        return Choice(Decoding(wanted, hw_decoder_load if wanted == "gpu" else 0.0), "as asked for, not probed")
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
    """What was measured of the rung that is right, and why those before it are not used."""
    said = [f"not {trial.decoding}: {trial.fault}" for trial in trials if trial.fault]
    if not trials[-1].fault:
        said.insert(0, f"{'probed earlier' if trials[-1].remembered else 'probed'}: {_values(trials[-1])}")
    return "; ".join(said)


def _values(trial: Trial) -> str:
    return f"at most {trial.worst_mean:.2f}/255 from the CPU, {trial.worst_far_share:.2%} of pixels beyond {FAR}/255"


# --- remembering


def _about() -> dict[str, Any]:
    """What a finding holds for: the machine's GPUs, those in use, driver, versions of packages and of our code."""
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
    """The machine's GPUs and driver from NVML, which leaves CUDA alone; the host's name where that cannot be told."""
    unknown = {"gpus": [], "driver": f"of {platform.node()}"}
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return unknown
    count, text = ctypes.c_uint(), ctypes.create_string_buffer(256)
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return unknown
    if nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return unknown
    driver, names = text.value.decode(), set()
    for index in range(count.value):
        device = ctypes.c_void_p()
        found = not nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
        if found and not nvml.nvmlDeviceGetName(device, text, len(text)):
            names.add(text.value.decode())
    return {"gpus": sorted(names), "driver": driver}


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
    """Whether a finding is of the stack itself; libraries abort where memory is short, too."""
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
    """Let a child try a rung, whatever becomes of the child; returns what was found, and the ends of its outputs."""
    started = time.monotonic()
    # Files, not pipes: what the child starts may hold a pipe open, and nobody would read it while it waits.
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = subprocess.Popen(
            command(rung, timeout_sec),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            process_group=0,  # killed with all that it starts; Ctrl-C is the parent's affair
            env=environment_of_children(),
        )
        try:
            status = child.wait(timeout_sec + _GRACE_SEC)
        except subprocess.TimeoutExpired:
            status = -signal.SIGALRM
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a driver may hold it for ever
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
        return Trial(rung, f"it crashed ({name}){hint}", None, None, 0, 0.0)
    if status > 0:
        return Trial(rung, f"it ended with exit status {status}{hint}", None, None, 0, 0.0)
    if answer is None:
        return Trial(rung, "its answer cannot be understood", None, None, 0, 0.0)
    fault, measured = _short(str(answer.get("fault", ""))), _measured(answer)
    if not fault:
        mean, share = measured["worst_mean"], measured["worst_far_share"]
        if mean is None or share is None or not measured["images"]:
            fault = "its answer cannot be understood"
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
    """The numbers of an answer, those that are none left out."""
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
    parser.add_argument("--all", action="store_true", help="every rung, after a right one and without a GPU, too")
    parser.add_argument("--hw-load", type=float, default=HW_DECODER_LOAD, help="share of a batch for the JPEG engine")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_SEC, help="seconds for each rung")
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
    if right is None:  # not even the CPU
        raise SystemExit(1)


if __name__ == "__main__":
    _main()
