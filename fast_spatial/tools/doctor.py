"""`launch.py doctor`: what works on this machine, what is missing, and the command that fixes it.

Needs no third-party package: `python -m fast_spatial.tools.doctor` runs even where launch.py cannot start.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fast_spatial.runtime.environment import DALI_PACKAGES, environment
from fast_spatial.runtime.files import write_json
from fast_spatial.tools import doctor_checks as checks
from fast_spatial.tools.doctor_checks import Finding, first_line

NAME_WIDTH, STATE_WIDTH = 14, 9
# Packages that later checks import.
IMPORTED = ("torch", "torchvision", "numba", "DALI")


class Check(NamedTuple):
    """A check, and whether training needs its subject: only then does an exception in it mean "missing"."""

    look: Callable[[], Finding]
    needed: bool


CHECKS = {
    "code": Check(checks.check_code, needed=False),
    "system": Check(checks.check_system, needed=True),
    "Python": Check(checks.check_python, needed=True),
    "packages": Check(checks.check_packages, needed=True),
    "torch": Check(partial(checks.check_import, "torch", "torch"), needed=True),
    "torchvision": Check(partial(checks.check_import, "torchvision", "torchvision"), needed=True),
    "numba": Check(partial(checks.check_import, "numba", "numba"), needed=True),
    "DALI": Check(partial(checks.check_import, "nvidia.dali", DALI_PACKAGES[0]), needed=True),
    "driver": Check(checks.check_driver, needed=False),
    "GPUs": Check(checks.check_gpus, needed=True),
    "bfloat16": Check(checks.check_bfloat16, needed=False),
    "JPEG decoder": Check(checks.check_jpeg_decoder, needed=False),
    "decoding": Check(checks.check_decoding, needed=False),
    "NCCL": Check(checks.check_nccl, needed=False),
    "compiler": Check(checks.check_compiler, needed=False),
    "apex": Check(checks.check_apex, needed=False),
    "CPUs": Check(checks.check_cpus, needed=False),
    "memory": Check(checks.check_memory, needed=False),
    "open files": Check(checks.check_descriptors, needed=False),
    "shared memory": Check(checks.check_shared_memory, needed=False),
    "cache": Check(checks.check_cache, needed=True),
    "loader": Check(checks.check_loader, needed=True),
}


def run(data: str = "", out: str = "", json: str = "") -> int:
    """Print the report line by line as checks finish. Returns 0 if training can run on this machine, else 1."""
    asked = dict(CHECKS)
    if data:
        asked["--data"] = Check(partial(checks.check_data, data), needed=True)
    if out:
        asked["--out"] = Check(partial(checks.check_out, out), needed=True)
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    findings: dict[str, Finding] = {}
    for name, check in asked.items():
        # Printed first, so that a check that hangs or crashes Python is named on the screen.
        print(f"{name:<{NAME_WIDTH}}", end="", flush=True)
        broken = [package for package in IMPORTED if package in findings and findings[package].state == "missing"]
        findings[name] = examine(check, broken)
        print(shown(findings[name], width))
    count = Counter(finding.state for finding in findings.values())
    able = not count["missing"]
    print("\n" + summary(count))
    if json:
        checked = {name: finding._asdict() for name, finding in findings.items()}
        write_json(Path(json), {"able": able, "checks": checked, "environment": _environment()})
        print(f"written to {json}")
    return 0 if able else 1


def examine(check: Check, broken: Sequence[str] = ()) -> Finding:
    """Run a check. An exception in it becomes a finding, or "not checked" if a package it needs is broken."""
    try:
        return check.look()
    except Exception as error:  # a broken machine may raise anything
        if broken:
            return Finding("warning", f"not checked: {' and '.join(broken)} cannot be imported")
        return Finding("missing" if check.needed else "warning", f"the check failed: {first_line(error)}")


def shown(finding: Finding, width: int) -> str:
    """A finding as printed behind its check's name, wrapped to `width` characters."""
    indent = " " * (NAME_WIDTH + STATE_WIDTH)
    about = textwrap.wrap(finding.found, width - len(indent), break_on_hyphens=False, break_long_words=False)
    # Commands to copy are never wrapped.
    lines = [*about, *([f"-> {finding.fix}"] if finding.fix else [])]
    return f"{finding.state:<{STATE_WIDTH}}" + f"\n{indent}".join(lines)


def summary(count: Counter[str]) -> str:
    """The last line of the report."""
    warnings = f"{count['warning'] or 'no'} warning{'s' * (count['warning'] != 1)}"
    if count["missing"]:
        return f"training cannot run on this machine: {count['missing']} missing, {warnings}"
    return f"training can run on this machine ({warnings})"


def _environment() -> dict[str, Any]:
    try:
        return environment()
    except Exception as error:  # a broken torch raises anything
        return {"failed": first_line(error)}


if __name__ == "__main__":
    sys.exit(run())
