"""The input and output of a group of benchmarks."""

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
    """A benchmark's configuration and derived values."""

    config: BenchConfig
    device: torch.device
    threads: int

    @cached_property
    def images(self) -> Path:
        """The folder of images; synthetic images are made on first use."""
        if self.config.data == SYNTHETIC:
            from benchmarks.jpegs import synthetic_images

            return synthetic_images()
        return data_folder(self.config.data)

    @property
    def limits(self) -> SpatialLimits:
        """The published limits: 30 degrees, 24 px."""
        return SpatialLimits.from_px(30)

    @property
    def timing(self) -> dict[str, Any]:
        """Timing arguments of `compare` and `rates_of`."""
        return {"rounds": self.config.rounds, "seconds": self.config.seconds}


@dataclass
class Findings:
    """Results of a group.

    Attributes:
        comparisons: ours and a baseline (`rounds.compare`).
        stages: images per second of each stage of training alone, by stage.
        facts: other measurements, by name.
        skipped: parts that did not run, with the reason.

    """

    comparisons: list[dict[str, Any]]
    stages: dict[str, float]
    facts: dict[str, Any]
    skipped: dict[str, str]

    @classmethod
    def none(cls) -> Findings:
        """Empty findings."""
        return cls([], {}, {}, {})

    def attempt(self, name: str, work: Callable[[Findings], None]) -> None:
        """Let `work` add its results. If it fails, record the reason under `skipped` and keep all other results."""
        try:
            work(self)
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] in OURS:
                raise
            self.skipped[name] = f"needs {error.name}, which is not installed"
        except Exception as error:  # a broken package or a failing device must not stop the other parts
            traceback.print_exc()
            self.skipped[name] = f"failed: {first_line(error)}"

    def add(self, other: Findings) -> None:
        """Merge another group's findings."""
        self.comparisons += other.comparisons
        self.stages |= other.stages
        self.facts |= other.facts
        self.skipped |= other.skipped
