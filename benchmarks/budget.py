"""Measure whether runs keep their time budget, and whether plans predict step times.

    python -m benchmarks.budget keep --out DIR --json_file benchmarks/results/budget.json
    python -m benchmarks.budget foresee --out DIR --json_file benchmarks/results/plan.json

`keep` reproduces rows of the digits with a user's commands, alone and while other processes use the cores, and times
them from outside. `foresee` plans for a folder of 1,000 classes (hard links to synthetic JPEG files of ImageNet's
size), and then times whole steps in separate processes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire

from benchmarks.jpegs import write_photograph
from fast_spatial.kernels.host import usable_cpus
from fast_spatial.runtime.environment import environment
from fast_spatial.runtime.files import write_json

ROOT = Path(__file__).resolve().parent.parent
ROW = "worst10:30"
# Per run: intervals during which other processes use all cores, in fractions of the budget; empty: none.
SLOW: tuple[tuple[tuple[float, float], ...], ...] = (
    *((), (), (), ()),
    ((0.0, 0.25),),
    ((0.3, 0.6),),
    ((0.5, 0.7),),
    ((0.65, 1.0),),
    ((0.0, 0.1), (0.2, 0.3), (0.4, 0.5), (0.6, 0.7), (0.8, 0.9)),
)
PHOTOGRAPHS, CLASSES, PER_CLASS = 300, 1000, {"train": 20, "val": 2}
BATCH = 256
SPIN = "while True: pass"


def keep(out: str, json_file: str, minutes: float = 2.0, table_minutes: float = 9.0) -> None:
    """Nine runs of one row, one run of the table, and one of the table that is killed half-way and resumed."""
    about = environment()
    runs = [
        _timed(Path(out) / f"row_{number}", minutes, ["--rows", ROW], slow=slow) for number, slow in enumerate(SLOW)
    ]
    table = _timed(Path(out) / "table", table_minutes, [])
    killed = _timed(Path(out) / "killed", table_minutes, [], kill_at=0.5)
    command = "python -m benchmarks.budget keep --out DIR --json_file FILE"
    write_json(Path(json_file), {**about, "command": command, "runs": runs, "table": table, "killed": killed})


def _timed(
    out: Path,
    minutes: float,
    flags: Sequence[str],
    *,
    slow: Sequence[tuple[float, float]] = (),
    kill_at: float = 0.0,
) -> dict[str, Any]:
    """Reproduce the digits with a budget in minutes, timed from outside; returns times and results."""
    budget = 60 * minutes
    words = ["reproduce", "--data", "digits", "--hours", f"{minutes / 60:.6f}", "--out", str(out), *flags]
    spinning = threading.Thread(target=_spin, args=([(a * budget, b * budget) for a, b in slow],))
    spinning.start()
    took = 0.0
    if kill_at:
        took += _run(words, kill_after=kill_at * budget)
    took += _run(words)
    spinning.join()
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    found = {
        "budget_sec": budget,
        "slow": slow,
        "killed_at": kill_at,
        "took_sec": round(took, 2),
        "unused_sec": round(budget - took, 2),
        "allowed_unused_sec": round(0.03 * budget + 15, 2),
        "kept": 0 <= budget - took <= 0.03 * budget + 15,
        "epochs_planned": [round(row["epochs"], 2) for row in plan["rows"]],
        "results": json.loads((out / "results.json").read_text(encoding="utf-8")),
    }
    print(json.dumps({name: value for name, value in found.items() if name != "results"}), flush=True)
    return found


def _run(words: Sequence[str], kill_after: float = 0.0) -> float:
    """Run launch.py; returns its wall-clock time in seconds. `kill_after` seconds (0: never), it gets SIGKILL."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, str(ROOT / "launch.py"), *words], start_new_session=True)
    if kill_after:
        time.sleep(kill_after)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return time.monotonic() - start
    if process.wait():
        raise SystemExit(f"launch.py {' '.join(words)}: exit status {process.returncode}")
    return time.monotonic() - start


def _spin(windows: Sequence[tuple[float, float]]) -> None:
    """Keep all cores busy during these (begin, end) windows, in seconds from now."""
    start = time.monotonic()
    for begin, end in windows:
        time.sleep(max(0.0, start + begin - time.monotonic()))
        processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(usable_cpus())]
        time.sleep(max(0.0, start + end - time.monotonic()))
        for process in processes:
            process.kill()
            process.wait()


def foresee(out: str, json_file: str, rows: str = "standard,random:30,worst10:30", steps: int = 4) -> None:
    """Plan for the synthetic folder, then time the steps of every row at every image size."""
    about = environment()
    data = _thousand_classes(Path(out) / "data")
    flags = ["--recipe", "fast", "--global-batch-size", str(BATCH), "--lr", "0.5"]
    words = ["reproduce", "--data", str(data), "--hours", "1000", "--rows", str(rows).strip("()").replace(" ", "")]
    words += ["--out", str(Path(out) / "plan"), "--plan-only", *flags]
    start = time.monotonic()
    if subprocess.run([sys.executable, str(ROOT / "launch.py"), *words], check=False).returncode:
        raise SystemExit(1)
    took = time.monotonic() - start
    plan = Path(out) / "plan" / "plan.json"
    rows_planned = json.loads(plan.read_text(encoding="utf-8"))["rows"]
    found = []
    for number, side in ((number, side) for number, row in enumerate(rows_planned) for side in row["step_sec"]):
        row = rows_planned[number]
        planned = row["step_sec"][side]
        command = [sys.executable, "-m", "benchmarks.budget", "steps", str(plan), str(number), side, str(steps)]
        measured = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT).stdout.split()[-1])
        found.append(
            {
                "row": row["name"],
                "side": int(side),
                "planned_step_sec": round(planned, 3),
                "measured_step_sec": round(measured, 3),
                "off_pct": round(100 * (planned / measured - 1), 1),
            }
        )
        print(found[-1], flush=True)
    command_line = "python -m benchmarks.budget foresee --out DIR --json_file FILE"
    write_json(
        Path(json_file),
        {**about, "command": command_line, "batch": BATCH, "planning_sec": round(took, 1), "steps": found},
    )


def steps(plan: str, row: int, side: int, count: int) -> None:
    """Print the median seconds per training step of a planned row, loading included, after two warm-up steps."""
    import torch

    from fast_spatial.config.fields import from_json
    from fast_spatial.config.train import TrainConfig
    from fast_spatial.data.images import load_split
    from fast_spatial.data.loading import training_loader
    from fast_spatial.runtime.device import dtype_of, seed_everything, synchronized_time
    from fast_spatial.runtime.distributed import World
    from fast_spatial.training.step import make_step

    values = json.loads(Path(plan).read_text(encoding="utf-8"))["rows"][row]["train"]
    config = dataclasses.replace(from_json(TrainConfig, values), image_size=side, start_size=0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seed_everything(config.seed, deterministic=False)
    images = load_split(config.data, "train")
    step = make_step(config, len(images.classes), device, dtype_of(config.dtype, device))
    loader = training_loader(config, images, World(0, 0, 1, device), side=side)
    ended = []
    for batch in itertools.islice(loader.epoch(0), count + 2):
        step(batch)
        ended.append(synchronized_time(device))
    print(statistics.median(after - before for before, after in itertools.pairwise(ended[1:])))


def _thousand_classes(folder: Path) -> Path:
    """1,000 classes of hard links to 300 photographs of noise."""
    photographs = [folder.parent / "photographs" / f"{number:03}.jpg" for number in range(PHOTOGRAPHS)]
    for number, path in enumerate(photographs):
        if not path.is_file():
            write_photograph(path, number)
    for split, label in itertools.product(PER_CLASS, range(CLASSES)):
        of_class = folder / split / f"class_{label:04}"
        of_class.mkdir(parents=True, exist_ok=True)
        for number in range(PER_CLASS[split]):
            link = of_class / f"{number:02}.jpg"
            if not link.exists():
                link.hardlink_to(photographs[(label * PER_CLASS[split] + number) % PHOTOGRAPHS])
    return folder


if __name__ == "__main__":
    fire.Fire({"keep": keep, "foresee": foresee, "steps": steps})
