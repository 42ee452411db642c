"""Measurements, written to a file one by one; a failing one does not stop the others."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fast_spatial.runtime.files import write_json

OURS = ("benchmarks", "fast_spatial", "kernels", "pipelines", "launch")


@dataclass
class Record:
    """Measurements by name, each a dictionary of figures.

    If a measurement failed, its figures are `error`, `skipped` (with the missing package) or `out_of_memory`.

    Attributes:
        path: the file, rewritten after every measurement; None: no file.
        found: the measurements so far.

    """

    path: Path | None = None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, name: str, values: dict[str, Any]) -> None:
        """Add the figures of a measurement."""
        self.found[name] = values
        if self.path is not None:
            write_json(self.path, {"measured": self.found})

    def measure(self, name: str, work: Callable[[], dict[str, Any]], *, needs: str = "") -> None:
        """Add the figures that `work` returns, with the peak of GPU memory, or the reason of its failure.

        If the package `needs` is missing or broken, the measurement is skipped.
        """
        print(f"  {name}", flush=True)
        if needs and (broken := _broken(needs)):
            self.put(name, {"skipped": f"needs {needs} ({broken})"})
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            values = work()
        except torch.OutOfMemoryError:
            values = {"out_of_memory": True}
        except Exception as error:  # a failure must not stop later measurements
            traceback.print_exc()
            values = {"error": first_line(error)}
        if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
            values["peak_memory_gib"] = round(peak / 2**30, 2)
        self.put(name, values)

    @property
    def errors(self) -> dict[str, str]:
        """The error messages of failed measurements, by name."""
        return {name: values["error"] for name, values in self.found.items() if "error" in values}


def _broken(package: str) -> str:
    """The reason why a package cannot be imported; "" if it can."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken package raises anything
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """The type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
