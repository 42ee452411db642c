"""`launch.py bench`: run the groups, write the comparisons, say in plain words what limits training here.

python -m benchmarks.bench JSON
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import grid, pipeline, score, step, warp
from benchmarks.jobs import Findings, Job
from benchmarks.jpegs import synthetic_images
from benchmarks.machine import machine
from benchmarks.verdict import table, verdict
from fast_spatial.config import SYNTHETIC, BenchConfig, from_json, to_json
from fast_spatial.data import data_folder
from fast_spatial.files import write_json
from kernels.cpus import usable_cpus

GROUPS: dict[str, Callable[[Job], Findings]] = {
    "warp": warp.run,
    "pipeline": pipeline.run,
    "score": score.run,
    "step": step.run,
    "grid": grid.run,
}


def run(config: BenchConfig) -> dict[str, Any]:
    """Run the groups that were asked for; what the JSON file holds."""
    threads = config.workers or usable_cpus()
    torch.set_num_threads(threads)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder = synthetic_images() if config.data == SYNTHETIC else data_folder(config.data)
    job = Job(config, device, threads, folder)
    found = Findings.none()
    for name, group in GROUPS.items():
        if config.what in (name, "all"):
            print(f"{name} ...", flush=True)
            found.add(group(job))
    words = [f"--{key.replace('_', '-')} {value}" for key, value in to_json(config).items() if value and key != "what"]
    return {
        **machine(),
        "command": " ".join([f"launch.py bench {config.what}", *words]),
        "threads": threads,
        "comparisons": found.comparisons,
        "stages_images_per_sec": found.stages,
        "facts": found.facts,
        "skipped": found.skipped,
        "verdict": verdict(found.stages),
    }


def main(values: str) -> None:
    """Run a configuration in JSON; print the table and the verdict, write the file."""
    config: BenchConfig = from_json(BenchConfig, json.loads(values))
    result = run(config)
    print(table(result))
    for line in result["verdict"]:
        print(line)
    if config.json:
        write_json(Path(config.json), result)
        print(f"written to {config.json}")


if __name__ == "__main__":
    main(sys.argv[1])
