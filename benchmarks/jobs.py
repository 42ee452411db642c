"""What every group of benchmarks is given."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.on_gpu.record import OURS, first_line
from fast_spatial.config.commands import SYNTHETIC, BenchConfig
from fast_spatial.data.images import data_folder
from fast_spatial.kernels.limits import SpatialLimits


@dataclass(frozen=True)
class Job:
    """A benchmark's configuration, and what follows from it."""

    config: BenchConfig
    device: torch.device
    threads: int

    @cached_property
    def images(self) -> Path:
        """The folder of images; synthetic ones are made when they are first asked for."""
        if self.config.data == SYNTHETIC:
            from benchmarks.jpegs import synthetic_images

            return synthetic_images()
        return data_folder(self.config.data)

    @property
    def limits(self) -> SpatialLimits:
        """The published limits of 30 degrees."""
        return SpatialLimits.from_px(30)

    @property
    def timing(self) -> dict[str, Any]:
        """How long to time: arguments of `compare` and `rates_of`."""
        return {"rounds": self.config.rounds, "seconds": self.config.seconds}


@dataclass
class Findings:
    """What a group found.

    Attributes:
        comparisons: ours against a baseline (`rounds.compare`).
        stages: images per second that each stage of training could reach alone, by stage.
        facts: other measurements, by name.
        skipped: what was not run, and why.

    """

    comparisons: list[dict[str, Any]]
    stages: dict[str, float]
    facts: dict[str, Any]
    skipped: dict[str, str]

    @classmethod
    def none(cls) -> Findings:
        """Nothing yet."""
        return cls([], {}, {}, {})

    def attempt(self, name: str, work: Callable[[Findings], None]) -> None:
        """Let a part add what it finds; if it fails, that is what was found, and what others found stays."""
        try:
            work(self)
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] in OURS:
                raise
            self.skipped[name] = f"it needs {error.name}, which is not installed"
        except Exception as error:  # a package that is broken here, a device that fails: the others go on
            traceback.print_exc()
            self.skipped[name] = f"it failed: {first_line(error)}"

    def add(self, other: Findings) -> None:
        """Take in another group's findings."""
        self.comparisons += other.comparisons
        self.stages |= other.stages
        self.facts |= other.facts
        self.skipped |= other.skipped
