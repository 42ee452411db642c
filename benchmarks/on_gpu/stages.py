"""The stages of `benchmarks/gpu.sh`. Each runs in its own process and writes its results after every measurement.

    python -m benchmarks.on_gpu.stages NAME OUT [--dry]

runs a single stage, into OUT/NAME.json. --dry uses tiny sizes and the CPU, to find errors without a GPU: it runs the
same code.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.jpegs import make_images
from benchmarks.on_gpu import rates
from benchmarks.on_gpu.gpu_stages import DRY_FACTOR, end
from benchmarks.on_gpu.record import Record, first_line
from fast_spatial.kernels.host import usable_cpus
from fast_spatial.pipelines.placement import Decoding, Placement
from fast_spatial.runtime.device import synchronized_time
from fast_spatial.runtime.environment import environment

ROOT = Path(__file__).resolve().parents[2]
PROBE_SEC = 30  # time-out of the probe of one rung
REPRODUCE_SEC = 120.0  # budget of the reproduction
RUN_SEC = 150.0  # time-out of a command of launch.py
LOADER_SEC = 40.0  # time-out of the loaders of one placement
TEST_SEC = 60  # time-out of one GPU test
MODES = ("standard", "worst10")
# Timed loaders: (decoder, share of the GPU's JPEG engine, warp).
LOADERS = (
    ("gpu", 0.65, "dali"),
    ("cpu", 0.0, "numba"),
    ("gpu", 0.0, "dali"),
    ("gpu", 0.65, "triton"),
    ("cpu", 0.0, "triton"),
    ("gpu", 0.9, "dali"),
    ("gpu-full", 0.0, "dali"),
    ("cpu", 0.0, "dali"),
)
# (decoder, warp) of training, the most informative first; the stage `train` measures the default.
PLACEMENTS = (
    ("gpu", "triton"),
    ("cpu", "triton"),
    ("cpu", "numba"),
    ("cpu", "dali"),
    ("gpu", "dali"),
    ("gpu-full", "triton"),
    ("gpu-full", "dali"),
)


@dataclass(frozen=True)
class Scale:
    """Sizes of the data on disk and of the runs.

    Attributes:
        rates: sizes of the measurements in memory.
        classes: number of classes of the synthetic images.
        per_class: images per class, by split.
        links: links to each training image, which lengthen epochs.
        batch: images per step.
        profile: number of steps in the trace.
        placed_images: images per epoch when placements are compared; 0: all.
        loader_sec: seconds that a loader is timed.
        reproduced: row of the reproduction.
        digits: flags of the run that is stopped and resumed.

    """

    rates: rates.Sizes
    classes: int
    per_class: dict[str, int]
    links: int
    batch: int
    profile: int
    placed_images: int
    loader_sec: float
    reproduced: str
    digits: dict[str, str]


FULL = Scale(
    rates.GPU,
    classes=8,
    per_class={"train": 64, "val": 8},
    links=58,
    batch=256,
    profile=5,
    placed_images=15_360,
    loader_sec=1.5,
    reproduced="worst10:30",
    digits={"mode": "worst10"},
)
DRY = Scale(
    rates.DRY,
    classes=2,
    per_class={"train": 6, "val": 1},
    links=7,
    batch=4,
    profile=2,
    placed_images=8,
    loader_sec=0.01,
    reproduced="standard",
    digits={"mode": "standard", "max-train-images": "256"},
)


@dataclass(frozen=True)
class Stage:
    """Input of a stage.

    Attributes:
        out: folder of the results.
        dry: whether this is a dry run on a CPU.
        record: receives the measurements.
        words: further words of its command line.

    """

    out: Path
    dry: bool
    record: Record
    words: Sequence[str] = ()

    @property
    def scale(self) -> Scale:
        return DRY if self.dry else FULL

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else torch.device("cuda", 0)

    @property
    def bench(self) -> rates.Bench:
        return rates.Bench(self.record, self.device, self.scale.rates, self.scale.rates.side)

    @property
    def images(self) -> Path:
        """Folder of the synthetic JPEG files."""
        return self.out / "cache" / "images"

    def scratch(self, name: str) -> Path:
        """A path that does not exist, in an existing folder."""
        folder = self.out / "cache" / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def launch(self, command: str, expected: int | None = 0, /, **flags: Any) -> float:
        """Run a command of launch.py; returns the seconds it took.

        Raises:
            RuntimeError: with the error or last line of its output, if its exit status is not the expected one.

        """
        words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        limit = RUN_SEC * (DRY_FACTOR if self.dry else 1)
        return run([sys.executable, str(ROOT / "launch.py"), command, *words], expected, limit)


def run(words: Sequence[str], expected: int | None = 0, limit: float = RUN_SEC) -> float:
    """Run a program for at most `limit` seconds and print its output; returns the seconds it took."""
    print("$", *words, flush=True)
    start = time.monotonic()
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        watch = threading.Timer(limit, end, [process])
        watch.start()
        assert process.stdout is not None
        lines = [""]
        for line in process.stdout:
            print(line, end="", flush=True)
            lines = [*lines[-20:], line.strip()]
        watch.cancel()
    if time.monotonic() - start >= limit:
        raise RuntimeError(f"not finished within {limit:.0f} s")
    if expected is not None and process.returncode != expected:
        said = [line for line in lines if re.search(r"Error|launch\.py: ", line)] or [line for line in lines if line]
        raise RuntimeError(f"exit status {process.returncode}: {said[-1] if said else 'no output'}")
    return time.monotonic() - start


# --- the machine


def machine(stage: Stage) -> None:
    """Record the environment and nvidia-smi, and measure the ceilings."""
    stage.record.put("environment", environment())
    if shutil.which("nvidia-smi") and not stage.dry:
        fields = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,pstate,mig.mode.current"
        words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        stage.record.measure("nvidia_smi", lambda: {"csv": subprocess.check_output(words, text=True).splitlines()})
    rates.ceilings(stage.bench)


def doctor(stage: Stage) -> None:
    """Run `launch.py doctor`."""
    found = stage.scratch("doctor").with_suffix(".json")

    def work() -> dict[str, Any]:
        found.unlink(missing_ok=True)
        stage.launch("doctor", None, json=found)
        said = json.loads(found.read_text(encoding="utf-8"))
        checks = said["checks"]
        states = Counter(check["state"] for check in checks.values())
        notable = {name: check["found"] for name, check in checks.items() if check["state"] in ("missing", "warning")}
        jpeg = checks["JPEG decoder"]
        answer = {"jpeg_decoder": jpeg["found"]} if jpeg["state"] == "ok" and not stage.dry else {}
        note = "able to train" if said["able"] else f"not able to train: {'; '.join(map(str, notable))}"
        return {
            "note": note,
            "able": said["able"],
            "states": dict(states),
            "notable": notable,
            **answer,
            "checks": checks,
        }

    stage.record.measure("doctor", work)


def decoder(stage: Stage) -> None:
    """Probe every rung of GPU decoding. A faulty rung is a result, not an error."""
    words = [sys.executable, "-m", "fast_spatial.pipelines.inspection.probe", "--all", f"--timeout={PROBE_SEC}"]
    numbers = itertools.count()
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if not line.startswith("{"):
                continue
            said = json.loads(line)
            if "rung" in said:
                stage.record.put(f"rung_{next(numbers)}", said)
            else:
                stage.record.put("about" if "about" in said else "chosen", said)
    chosen = stage.record.found.get("chosen", {}).get("decoding")
    stage.record.put(
        "decoder", {"note": f"right: {chosen}"} if chosen else {"error": "no decoding is correct; see its log"}
    )


# --- in the device's memory


def eager(stage: Stage) -> None:
    """Training, scoring, warps and fused convolutions, without compilation."""
    bench = stage.bench
    rates.networks(bench, compiled=False)
    rates.warps(bench)
    rates.rewritten(bench)
    rates.fused_convolutions(bench)
    rates.dali_views(bench)  # last, because DALI may crash the process


def large(stage: Stage) -> None:
    """One pass whose largest activation has more than 2^31 elements."""
    bench, batch = stage.bench, stage.scale.rates.score[0] * 2
    peak = rates.peak_flops(bench)
    bench.record.measure(
        f"score_{bench.side}px_batch_{batch}", partial(rates.score, bench, bench.side, batch, peak=peak)
    )


def compiled(stage: Stage) -> None:
    """The trained network through torch.compile."""
    rates.networks(stage.bench, compiled=True)


def grid(stage: Stage) -> None:
    """The exhaustive attack in each dtype."""
    rates.grid_attack(stage.bench)


# --- tests


class _Reporter:
    """A pytest plugin: sets a time-out per test and records the outcomes."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def pytest_runtest_protocol(self) -> None:
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(TEST_SEC)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            values: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 2)}
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                values["error"] = (
                    str(crash.message if crash else report.longrepr).strip().split("\n", maxsplit=1)[0][:300]
                )
            if report.skipped and isinstance(report.longrepr, tuple):
                values["why"] = str(report.longrepr[2])
            self._record.put(report.nodeid.rpartition("::")[2], values)
        if report.when == "teardown":
            signal.alarm(0)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"the test took longer than {TEST_SEC} s")


def gpu_tests(stage: Stage, which: str) -> None:
    """Run the tests in tests/gpu/test_gpu.py that the expression `which` selects."""
    import pytest

    words = ["-p", "no:cacheprovider", "-m", "gpu", "-rs", "-k", which, str(ROOT / "tests" / "gpu" / "test_gpu.py")]
    status = pytest.main(words, plugins=[_Reporter(stage.record)])
    outcomes = Counter(figures["outcome"] for figures in stage.record.found.values())
    stage.record.put("note", {"note": ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())})
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        stage.record.put("pytest", {"error": f"pytest ended with {status!r}"})


# --- from files


def prepare(stage: Stage) -> None:
    """Prepare in the background what other stages need: compiled numba kernels, synthetic JPEG files."""
    scale = stage.scale

    def files() -> dict[str, Any]:
        start = time.monotonic()
        make_images(stage.images, scale.classes, scale.per_class, scale.links)
        return {"seconds": round(time.monotonic() - start, 1)}

    def kernels() -> dict[str, Any]:
        from fast_spatial.kernels.warp import warp

        start = time.monotonic()
        warp(rates.pictures(1, 32), rates.drawn_matrices(1, 2, 32))
        importlib.import_module("fast_spatial.pipelines.ops")  # compiles its operators
        return {"seconds": round(time.monotonic() - start, 1)}

    stage.record.measure("numba", kernels, needs="nvidia.dali")
    stage.record.measure("images", files)


def loader(stage: Stage) -> None:
    """The loader alone, by placement. Each runs in its own process, because a decoder may crash or hang."""
    prepare_images(stage)
    for on, share, warp in LOADERS:
        if stage.dry and on != "cpu":
            continue
        name = on + (f"_engine_{share:g}" if on == "gpu" else "") + f"_{warp}"
        found = stage.out / "one_loader.json"
        found.unlink(missing_ok=True)
        words = ["one_loader", str(stage.out), on, str(share), warp, *(["--dry"] if stage.dry else [])]
        fault = ""
        try:
            run(
                [sys.executable, "-m", "benchmarks.on_gpu.stages", *words],
                0,
                LOADER_SEC * (DRY_FACTOR if stage.dry else 1),
            )
        except RuntimeError as error:
            fault = str(error)
        measured = json.loads(found.read_text(encoding="utf-8"))["measured"] if found.is_file() else {}
        found.unlink(missing_ok=True)
        for mode in MODES:
            stage.record.put(f"loader_{mode}_{name}", measured.get(mode, {"error": fault}))


def one_loader(stage: Stage) -> None:
    """The work of one of these processes."""
    on, share, warp = stage.words
    for mode in MODES:
        stage.record.measure(mode, partial(_loader, stage, mode, Placement(Decoding(on, float(share)), warp)))


def prepare_images(stage: Stage) -> None:
    """Make the synthetic JPEG files unless they exist."""
    make_images(stage.images, stage.scale.classes, stage.scale.per_class, stage.scale.links)


def _loader(stage: Stage, mode: str, placement: Placement) -> dict[str, Any]:
    from benchmarks.groups.pipeline import make_loader
    from fast_spatial.pipelines.dataset import read_index

    made = make_loader(
        read_index(stage.images, "train"),
        mode,
        limits=rates.LIMITS,
        side=stage.scale.rates.side,
        batch=stage.scale.batch,
        threads=usable_cpus(),
        device=stage.device,
        placement=placement,
    )
    batches = (batch for epoch in itertools.count() for batch in made.epoch(epoch))
    for _ in range(6):  # drop prefetched batches
        next(batches)
    images, start = 0, synchronized_time(stage.device)
    while time.perf_counter() - start < stage.scale.loader_sec:
        images += len(next(batches).labels)  # only labels: Triton would make views on access
    spent = synchronized_time(stage.device) - start
    return {"images_per_sec": round(images / spent, 1), "threads": usable_cpus()}


def train(stage: Stage) -> None:
    """Training by launch.py from files, with default settings but without the compiler, and a profile of its steps."""
    prepare_images(stage)
    for mode in ("worst10", "standard"):
        stage.record.measure(f"train_{mode}", partial(_train, stage, mode, profile=stage.scale.profile))


def train_compiled(stage: Stage) -> None:
    """Training from files through torch.compile, the default on GPUs."""
    prepare_images(stage)
    for mode in ("worst10", "standard"):
        stage.record.measure(f"train_{mode}_compiled", partial(_train, stage, mode, compile="auto"))


def placements(stage: Stage) -> None:
    """Training from files with every decoder and warp."""
    prepare_images(stage)
    for mode, (decode, warp) in itertools.product(("worst10", "standard"), PLACEMENTS):
        if stage.dry and decode != "cpu":
            continue
        flags = {"decode": decode, "warp": warp, "in_process": "true", "max_train_images": stage.scale.placed_images}
        work = partial(_train, stage, mode, **flags)
        stage.record.measure(f"train_{mode}_decode_{decode}_warp_{warp}", work)


def _train(stage: Stage, mode: str, **flags: Any) -> dict[str, Any]:
    scale, name = stage.scale, "-".join(["train", mode, *map(str, flags.values())])
    out = stage.scratch(name)
    took = stage.launch(
        "train",
        data=stage.images,
        out=out,
        mode=mode,
        epochs=2,
        global_batch_size=scale.batch,
        image_size=scale.rates.side,
        eval_every=0,
        checkpoint_every=0,
        lr=0.01,
        **{"compile": "false", **flags},
    )
    # The first epoch is not representative: cuDNN chooses algorithms, and the profiler runs.
    first, last = records(out, "train")
    found = {
        "images_per_sec": last["images_per_sec"],
        "data_wait_pct": last["data_wait_pct"],
        "loss": last["loss"],
        "first_epoch_images_per_sec": first["images_per_sec"],
        "seconds": round(took, 1),
    }
    if "energy_kwh" in last:
        found["energy_kwh"] = last["energy_kwh"]
    lines = (out / "environment.jsonl").read_text(encoding="utf-8").splitlines()
    if decoding := json.loads(lines[-1]).get("decoding"):
        found["decoding"] = {name: decoding[name] for name in ("decoding", "why")}
    if failures := records(out, "decoding"):  # failures of the GPU decoder during training
        found["decoding_failures"] = [failure["what"] for failure in failures]
    if (out / "profile.json").is_file():
        found["profile"] = costs(out / "profile.json")
    shutil.rmtree(out)
    return found


def records(out: Path, event: str) -> list[dict[str, Any]]:
    """The records of one event in a run's log."""
    with contextlib.suppress(FileNotFoundError):
        lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for line in lines if (record := json.loads(line))["event"] == event]
    return []


def costs(trace: Path, most: int = 12) -> dict[str, Any]:
    """The most expensive kernels in a trace, in ms and percent of all kernels; on a CPU, the operators."""
    events = [e for e in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if e.get("ph") == "X"]
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    chosen = [e for e in events if e.get("cat") in kinds] or [e for e in events if e.get("cat") == "cpu_op"]
    spent: Counter[str] = Counter()
    for event in chosen:
        spent[event["name"]] += event["dur"]
    parts: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "gpu_user_annotation":
            parts[event["name"]] += event["dur"]
    total = sum(spent.values())
    return {
        "total_ms": round(total / 1000, 2),
        "largest": [
            {"name": name[:160], "ms": round(us / 1000, 2), "pct": round(100 * us / total, 1)}
            for name, us in spent.most_common(most)
        ],
        "parts_ms": {name: round(us / 1000, 2) for name, us in parts.most_common(most)},
    }


# --- commands


def export(stage: Stage) -> None:
    """Export an untrained network by `launch.py export`, which verifies the files."""
    from torchvision.models import resnet18

    checkpoint = stage.scratch("export").with_suffix(".pt")
    torch.save(resnet18(num_classes=10).state_dict(), checkpoint)
    for kind, package in (("safetensors", "safetensors"), ("onnx", "onnxruntime")):
        if importlib.util.find_spec(package) is None:
            stage.record.put(kind, {"skipped": f"needs {package}"})
            continue
        stage.record.measure(kind, partial(_export, stage, checkpoint, kind))


def _export(stage: Stage, checkpoint: Path, kind: str) -> dict[str, Any]:
    target = checkpoint.with_suffix(f".{kind}")
    took = stage.launch("export", checkpoint=checkpoint, **{kind: target})
    return {"seconds": round(took, 1), "bytes": target.stat().st_size}


def resume(stage: Stage) -> None:
    """Stop a run on the digits with SIGTERM after its first epoch, and resume it."""
    stage.record.measure("resume", partial(_resume, stage))


def _resume(stage: Stage) -> dict[str, Any]:
    out, epochs = stage.scratch("resume"), 8
    flags = {"data": "digits", "out": out, "epochs": epochs, "eval-every": 0, "compile": "false", **stage.scale.digits}
    words = [sys.executable, str(ROOT / "launch.py"), "train", *(f"--{name}={value}" for name, value in flags.items())]
    print("$", *words, flush=True)
    with subprocess.Popen(words, cwd=ROOT) as process:
        while process.poll() is None and not records(out, "train"):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    before = len(records(out, "train"))
    if status != 128 + signal.SIGTERM or before >= epochs:
        raise RuntimeError(f"after SIGTERM in epoch {before} of {epochs}, the run ended with exit status {status}")
    took = run(words)
    found = [record["epoch"] for record in records(out, "train") if record["epoch"] == round(record["epoch"])]
    (judged,) = records(out, "evaluation")
    if found != list(range(1, epochs + 1)):
        raise RuntimeError(f"the resumed run's log has the epochs {found}")
    return {"stopped_after_epochs": before, "epochs": epochs, "seconds": round(took, 1), "top1_pct": judged["top1_pct"]}


def reproduce(stage: Stage) -> None:
    """Reproduce a row of the digits within two minutes, including planning, evaluation and report."""
    out, budget = stage.scratch("reproduce"), REPRODUCE_SEC

    def work() -> dict[str, Any]:
        # Two minutes are too short for compilation.
        flags = {"rows": "worst10:30", "hours": f"{budget / 3600:.6f}", "compile": "false"}
        took = stage.launch("reproduce", data="digits", out=out, **flags)
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        if took > budget + 5:
            raise RuntimeError(f"took {took:.0f} s, with a budget of {budget:.0f} s")
        kept = ("mode", "natural_top1_pct", "random_top1_pct", "worst10_top1_pct", "grid_top1_pct", "epochs")
        rows = [{name: row[name] for name in kept if name in row} for row in results]
        return {"budget_sec": budget, "took_sec": round(took, 1), "rows": rows}

    stage.record.measure("reproduce", work)


WORKS: dict[str, Callable[[Stage], None]] = {
    "prepare": prepare,
    "machine": machine,
    "doctor": doctor,
    "decoder": decoder,
    "eager": eager,
    "large": large,
    "tests": partial(gpu_tests, which="not compiled and not memory and not activation and not nccl and not stream"),
    "stream": partial(gpu_tests, which="stream"),
    "nccl": partial(gpu_tests, which="nccl and not True"),
    "loader": loader,
    "one_loader": one_loader,
    "train": train,
    "compiled": compiled,
    "grid": grid,
    "export": export,
    "resume": resume,
    "train_compiled": train_compiled,
    "reproduce": reproduce,
    "placements": placements,
    "compile_tests": partial(gpu_tests, which="compiled or memory or activation or (nccl and True)"),
}


def main(name: str, out: str, *flags: str) -> int:
    """Run a stage in this process; returns 1 if a part of it failed, else 0."""
    record = Record(Path(out) / f"{name}.json")
    stage = Stage(Path(out), "--dry" in flags, record, [word for word in flags if word != "--dry"])
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(usable_cpus())
    record.path.unlink(missing_ok=True)  # type: ignore[union-attr]
    try:
        WORKS[name](stage)
    except Exception as error:  # outside the measurements
        record.put(name, {"error": first_line(error)})
        raise
    return 1 if record.errors else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main(*sys.argv[1:]))
