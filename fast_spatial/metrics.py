"""Counting without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fast_spatial.distributed import sum_over_ranks


class Tally:
    """Running sums of named quantities over images, on the device; read only when somebody asks."""

    def __init__(self, device: torch.device, *names: str) -> None:
        self._names = names
        self._sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)

    def add(self, *values: Tensor) -> None:
        """Add per-image values, [B] each, in the order of the names."""
        assert len(values) == len(self._names)
        count = torch.full((), len(values[0]), dtype=torch.float64, device=self._sums.device)
        self._sums += torch.stack([*(v.detach().double().sum() for v in values), count])

    def means(self, *, over_ranks: bool) -> dict[str, float]:
        """The mean of each quantity over this process's images, or everyone's; waits for the device."""
        sums = sum_over_ranks(self._sums.clone()) if over_ranks else self._sums
        *totals, count = sums.tolist()
        return {name: total / count if count else float("nan") for name, total in zip(self._names, totals)}
