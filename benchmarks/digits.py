"""Reproduce the table on the digits with three seeds, and record the environment.

    python -m benchmarks.digits --out DIR --json_file benchmarks/results/digits.json

Rows that exist in DIR are not trained again. Afterwards, `python -m benchmarks.tables` updates the documents.
"""

from __future__ import annotations

import json
from pathlib import Path

import fire

from fast_spatial import commands
from fast_spatial.runtime.environment import environment
from fast_spatial.runtime.files import write_json


def main(out: str, json_file: str, seeds: str = "0,1,2") -> None:
    """Reproduce the digits' rows and write their results."""
    about = environment()
    words = ["reproduce", "--data", "digits", "--out", str(out), "--seeds", str(seeds).strip("()").replace(" ", "")]
    if commands.main(words):
        raise SystemExit(1)
    results = json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))
    command = "launch.py " + " ".join(words).replace(str(out), "OUT")
    write_json(Path(json_file), {**about, "command": command, "results": results})


if __name__ == "__main__":
    fire.Fire(main)
