"""The digits' reproduction on three seeds, and what it ran on.

    python -m benchmarks.digits --out DIR --json_file benchmarks/results/digits.json

Rows that DIR already holds are not trained again. `python -m benchmarks.tables` then writes the README's table.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fire

import launch
from fast_spatial.files import write_json
from kernels.cpus import usable_cpus

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "numba", "numpy")


def machine() -> dict[str, Any]:
    """What a result depends on besides the code."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "hardware": f"{usable_cpus()} cores of an {cpu}",
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
    }


def main(out: str, json_file: str, seeds: str = "0,1,2") -> None:
    """Reproduce the digits' rows and write their results."""
    words = ["reproduce", "--data", "digits", "--out", str(out), "--seeds", str(seeds).strip("()").replace(" ", "")]
    if launch.main(words):
        raise SystemExit(1)
    results = json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))
    command = "launch.py " + " ".join(words).replace(str(out), "OUT")
    write_json(Path(json_file), {**machine(), "command": command, "results": results})


if __name__ == "__main__":
    fire.Fire(main)
