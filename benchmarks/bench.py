"""`launch.py bench`: run the groups, write the comparisons, say in plain words what limits training here.

python -m benchmarks.bench JSON
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.groups.verdict import table, verdict
from benchmarks.jobs import Findings, Job
from benchmarks.slow_disk import restart
from fast_spatial.config.commands import BenchConfig
from fast_spatial.config.fields import from_json, to_json
from fast_spatial.kernels.host import usable_cpus
from fast_spatial.runtime.environment import environment
from fast_spatial.runtime.files import write_json

# What only a GPU shows comes first: its machines are had for a short time.
GROUPS = ("gpu", "warp", "pipeline", "score", "step", "grid")


def run(config: BenchConfig, keep: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Run the groups that were asked for; what the JSON file holds, which `keep` is also given after every group."""
    threads = config.workers or usable_cpus()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    about = environment()  # before anything else changes in the working tree
    job = Job(config, device, threads)
    found = Findings.none()
    # Of paths the last part: where files lie on this machine says nothing to others.
    asked = {key: Path(value).name if isinstance(value, str) else value for key, value in to_json(config).items()}
    words = [f"--{key.replace('_', '-')} {value}" for key, value in asked.items() if value and key != "what"]
    result: dict[str, Any] = {}
    for name in GROUPS:
        if config.what == name or (config.what == "all" and (name != "gpu" or device.type == "cuda")):
            print(name, flush=True)
            # The same for every group, whatever ran before.
            torch.set_num_threads(threads)
            torch.backends.cudnn.benchmark = True
            found.attempt(name, partial(_run_group, name, job))
            result = {
                **about,
                "command": " ".join([f"launch.py bench {config.what}", *words]),
                "threads": threads,
                "comparisons": found.comparisons,
                "stages_images_per_sec": found.stages,
                "facts": found.facts,
                "skipped": found.skipped,
                "verdict": verdict(found.stages, overlapping=device.type == "cuda"),
            }
            keep(result)
    return result


def _run_group(name: str, job: Job, found: Findings) -> None:
    found.add(importlib.import_module(f"benchmarks.groups.{name}").run(job))


def main(values: str) -> None:
    """Run a configuration in JSON; print the table and the verdict, write the file."""
    config: BenchConfig = from_json(BenchConfig, json.loads(values))
    if config.read_latency_ms:
        restart(config.read_latency_ms)

    def keep(result: dict[str, Any]) -> None:
        if config.json:
            write_json(Path(config.json), result)

    result = run(config, keep)
    print(table(result))
    for line in result["verdict"]:
        print(line)
    if config.json:
        print(f"written to {config.json}")


if __name__ == "__main__":
    main(sys.argv[1])
