"""`launch.py bench`: run the groups, write the comparisons, and name the stage that limits training.

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

# The GPU group comes first, since GPU machines are often available only for a short time.
GROUPS = ("gpu", "warp", "pipeline", "score", "step", "grid")


def run(config: BenchConfig, keep: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Run the requested groups; returns the content of the JSON file. `keep` receives it after every group."""
    threads = config.workers or usable_cpus()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    about = environment()  # first, so that it describes the working tree at the start
    job = Job(config, device, threads)
    found = Findings.none()
    # Only the last part of paths: the folders of this machine mean nothing elsewhere.
    asked = {key: Path(value).name if isinstance(value, str) else value for key, value in to_json(config).items()}
    words = [f"--{key.replace('_', '-')} {value}" for key, value in asked.items() if value and key != "what"]
    result: dict[str, Any] = {}
    for name in GROUPS:
        if config.what == name or (config.what == "all" and (name != "gpu" or device.type == "cuda")):
            print(name, flush=True)
            # Reset for every group, so that none depends on earlier ones.
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
    """Run a configuration, given in JSON; print the table and the verdict, and write the file."""
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
