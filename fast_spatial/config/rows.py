"""Rows of the published table: the requested ones, and the training of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

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
        configure: returns the row's training; takes raw flags to add to the given ones.
        importance: if the budget is too small for all rows, the lowest is dropped first.

    """

    name: str
    configure: Callable[[Mapping[str, str]], TrainConfig]
    importance: tuple[int, int] = (0, 0)


def requests(config: ReproduceConfig, train_flags: dict[str, str]) -> list[RowRequest]:
    """Every requested row and seed; `train_flags` are raw values of training options."""
    launch = {f.name: getattr(config, f.name) for f in dataclasses.fields(LaunchOptions)}

    def request(seed: int, row: str) -> RowRequest:
        mode, degrees = split_row(row)
        out = Path(config.out) / row.replace(":", "_") / f"seed_{seed}"
        decided = {"data": config.data, "out": str(out), "mode": mode, "degrees": str(degrees), "seed": str(seed)}
        name = row_name(mode, degrees) + (f", seed {seed}" if len(config.seeds) > 1 else "")
        importance = (-seed, -BY_IMPORTANCE.index(row) if row in BY_IMPORTANCE else 0)
        return RowRequest(
            name,
            lambda more: train_config({**train_flags, **decided, **more}, launch),
            importance,
        )

    return [
        request(seed, row)
        for seed in config.seeds
        for row in config.rows or (DIGITS_ROWS if config.data == DIGITS else IMAGENET_ROWS)
    ]
