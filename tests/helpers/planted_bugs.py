"""Plant typical bugs of a spatial trainer, one at a time, in a copy of the project; tests must catch each.

    python -m tests.helpers.planted_bugs

Prints the first failing test of every bug. Exit status 1 means that a bug passed all its tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Bug(NamedTuple):
    """A bug: description, file, replaced text, replacement, and the tests to run."""

    name: str
    file: str
    old: str
    new: str
    tests: str


BUGS = (
    Bug(
        "degrees taken for radians",
        "kernels/spatial.py",
        "math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))",
        "math.cos(angle_deg), math.sin(angle_deg)",
        "tests/kernels/test_warp.py",
    ),
    Bug(
        "tx and ty swapped",
        "kernels/spatial.py",
        "params_N3[n, 0], params_N3[n, 1], params_N3[n, 2], side",
        "params_N3[n, 0], params_N3[n, 2], params_N3[n, 1], side",
        "tests/kernels/test_warp.py",
    ),
    Bug(
        "sign of the angle",
        "kernels/spatial.py",
        "math.sin(math.radians(angle_deg))",
        "-math.sin(math.radians(angle_deg))",
        "tests/kernels/test_warp.py",
    ),
    Bug(
        "align_corners=False in the reference",
        "kernels/warp.py",
        "align_corners=True",
        "align_corners=False",
        "tests/kernels/test_warp.py",
    ),
    Bug(
        "centre at S/2, as align_corners=False has it",
        "kernels/spatial.py",
        "c = (side - 1) / 2.0",
        "c = side / 2.0",
        "tests/kernels/test_warp.py",
    ),
    Bug(
        "BatchNorm in training mode while scoring",
        "fast_spatial/training/step.py",
        "passes(batch.views)",
        "self.model(batch.views.flatten(0, 1)).detach().view(*batch.views.shape[:2], -1)",
        "tests/training/test_step.py",
    ),
    Bug(
        "argmin for argmax",
        "fast_spatial/evaluation/attack.py",
        "losses_BV.amax(dim=1, keepdim=True)",
        "losses_BV.amin(dim=1, keepdim=True)",
        "tests/evaluation/test_attack.py",
    ),
    Bug(
        "the untouched image missing from worst10",
        "fast_spatial/config/modes.py",
        '"worst10": Mode(center=False, untouched=True',
        '"worst10": Mode(center=False, untouched=False',
        "tests/config/test_config.py",
    ),
    Bug(
        "a survivor dropped on a random view",
        "fast_spatial/evaluation/verdicts.py",
        "if meets and natural:",
        "if meets and natural and all_views:",
        "tests/evaluation/test_attack.py",
    ),
    Bug(
        "a round counted although one before it is unfinished",
        "pipelines/dataset.py",
        ".all(axis=1).cumprod().sum()",
        ".all(axis=1).sum()",
        "tests/evaluation/test_landscape.py",
    ),
    Bug(
        "local for global rank",
        "fast_spatial/data/loading.py",
        "Shard(world.rank,",
        "Shard(world.local_rank,",
        "tests/training/test_train.py",
    ),
    Bug(
        "colour applied after the warp's black border",
        "kernels/warp_cpu.py",
        "    scratch[0, :] = 0\n",
        "    scratch[0, :] = int(colour_34[0, 3])\n",
        "tests/kernels/test_warp.py",
    ),
    Bug(
        "colour applied after the warp's black border, in DALI",
        "pipelines/ops.py",
        "fill_value=0)",
        "fill_value=50)",
        "tests/kernels/test_warp.py",
    ),
    Bug(
        "pairs taken for anti-correlated",
        "fast_spatial/reporting/statistics.py",
        "one**2 - 2 * correlation * one * other",
        "one**2 + 2 * correlation * one * other",
        "tests/reporting/test_statistics.py",
    ),
    Bug(
        "robust on some view taken for robust on all",
        "fast_spatial/reporting/robustness.py",
        "wilson(int(correct.all(axis=1).sum()), len(correct))",
        "wilson(int(correct.any(axis=1).sum()), len(correct))",
        "tests/reporting/test_report_of_runs.py",
    ),
    Bug(
        "a heat map upside down",
        "fast_spatial/reporting/charts.py",
        "corners = (0, width or values.shape[1], values.shape[0], 0)",
        "corners = (0, width or values.shape[1], 0, values.shape[0])",
        "tests/reporting/test_charts.py",
    ),
    Bug(
        "the worst view of another image",
        "fast_spatial/evaluation/landscape.py",
        "predicted_BG.gather(1, worst_B[:, None])[:, 0]",
        "predicted_BG.gather(1, worst_B.flip(0)[:, None])[:, 0]",
        "tests/evaluation/test_landscape.py",
    ),
)


def first_failure(bug: Bug) -> str | None:
    """The first test that fails with the bug planted, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(
            ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
        )
        planted = copy / bug.file
        text = planted.read_text(encoding="utf-8")
        if text.count(bug.old) < 1:
            raise SystemExit(f"{bug.name}: {bug.file} no longer holds {bug.old!r}")
        planted.write_text(text.replace(bug.old, bug.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", bug.tests]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        ended = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", ended.stdout, flags=re.MULTILINE)
    return found[1] if found else None


def main() -> int:
    """Plant every bug and print the test that caught it."""
    missed = 0
    for bug in BUGS:
        caught = first_failure(bug)
        missed += caught is None
        print(f"{bug.name}: {caught or 'NOT CAUGHT'}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
