"""Rows of the published table: the requested ones, and the training of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_spatial.config.commands import ReproduceConfig
from fast_spatial.config.modes import DIGITS, PUBLISHED, row_name, split_row
from fast_spatial.config.recipes import train_config
from fast_spatial.config.train import LaunchOptions, TrainConfig

DIGITS_ROWS = ("nocrop", "standard", "random:30", "worst10:30")
IMAGENET_ROWS = tuple(mode if not degrees else f"{mode}:{degrees:g}" for mode, degrees in PUBLISHED)
# If the budget is too small for all rows, the last ones of this list are dropped first.
BY_IMPORTANCE = ("standard", "worst10:30", "random:30", "nocrop", "worst10:40", "random:40")
# Options of `train` that reproduce sets.
DECIDED = ("mode", "degrees", "translate_px", "seed", "replay")


@dataclass(frozen=True)
class RowRequest:
    """A requested row.

    Attributes:
        name: the row's name in tables and messages.
        flags: raw values of its training's options.
        preset: values of its training's options that a recipe and flags override.
        importance: if the budget is too small for all rows, the lowest is dropped first.

    """

    name: str
    flags: Mapping[str, str]
    preset: Mapping[str, Any] = field(default_factory=dict)
    importance: tuple[int, int] = (0, 0)

    def configure(self, recipe: Mapping[str, str]) -> TrainConfig:
        """The row's training under a recipe, given as more raw flags.

        Raises:
            UserError: on an invalid recipe or flag.

        """
        return train_config({**self.flags, **recipe}, self.preset)


def requests(config: ReproduceConfig, train_flags: Mapping[str, str]) -> list[RowRequest]:
    """Every requested row and seed; `train_flags` are raw values of training options."""
    rows = config.rows or (DIGITS_ROWS if config.data == DIGITS else IMAGENET_ROWS)
    return [_request(config, train_flags, seed, row) for seed in config.seeds for row in rows]


def _request(config: ReproduceConfig, train_flags: Mapping[str, str], seed: int, row: str) -> RowRequest:
    mode, degrees = split_row(row)
    out = Path(config.out) / row.replace(":", "_") / f"seed_{seed}"
    decided = {"data": config.data, "out": str(out), "mode": mode, "degrees": str(degrees), "seed": str(seed)}
    return RowRequest(
        name=row_name(mode, degrees) + (f", seed {seed}" if len(config.seeds) > 1 else ""),
        flags={**train_flags, **decided},
        preset={f.name: getattr(config, f.name) for f in dataclasses.fields(LaunchOptions)},
        importance=(-seed, -BY_IMPORTANCE.index(row) if row in BY_IMPORTANCE else 0),
    )
