"""Measurements that are kept one by one: a file is rewritten after each, and one that fails stops no other."""

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

    Where one could not be made, its figures are `error`, `skipped` (which says what it needs) or `out_of_memory`.

    Attributes:
        path: the file, rewritten after every measurement; None: no file.
        found: what was measured.

    """

    path: Path | None = None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, name: str, values: dict[str, Any]) -> None:
        """Keep figures."""
        self.found[name] = values
        if self.path is not None:
            write_json(self.path, {"measured": self.found})

    def measure(self, name: str, work: Callable[[], dict[str, Any]], *, needs: str = "") -> None:
        """Keep the figures that `work` returns, with the peak of GPU memory, or why there are none.

        `needs` is a package without which it is skipped, missing or broken.
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
        except Exception as error:  # whatever a GPU does: what comes after is measured all the same
            traceback.print_exc()
            values = {"error": first_line(error)}
        if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
            values["peak_memory_gib"] = round(peak / 2**30, 2)
        self.put(name, values)

    @property
    def errors(self) -> dict[str, str]:
        """What failed, and why."""
        return {name: values["error"] for name, values in self.found.items() if "error" in values}


def _broken(package: str) -> str:
    """Why a package cannot be imported; "" if it can."""
    try:
        importlib.import_module(package)
    except Exception as error:  # a broken package raises anything
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
