"""Counters on the device, without synchronization at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from fast_spatial.runtime.distributed import all_reduce_min, all_reduce_sum


class Tally:
    """Running sums of named quantities over images; they stay on the device until they are read."""

    def __init__(self, device: torch.device, *names: str) -> None:
        self._names = names
        self._sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)

    def add(self, *values: Tensor) -> None:
        """Add per-image values, [B] each, in the order of the names."""
        assert len(values) == len(self._names)
        count = torch.full((), len(values[0]), dtype=torch.float64, device=self._sums.device)
        self._sums += torch.stack([*(v.detach().double().sum() for v in values), count])

    def means(self, *, over_ranks: bool) -> dict[str, float]:
        """The mean of each quantity over the images of this process, or of all processes; synchronizes the device."""
        sums = all_reduce_sum(self._sums.clone()) if over_ranks else self._sums
        *totals, count = sums.tolist()
        return {name: total / count if count else float("nan") for name, total in zip(self._names, totals)}

    def state(self) -> list[float]:
        """The sums over all processes, for `load`; synchronizes the device."""
        return all_reduce_sum(self._sums.clone()).tolist()  # type: ignore[no-any-return]

    def load(self, state: list[float]) -> None:
        """Restore the sums of `state`; on one process only, since they cover all processes."""
        self._sums.copy_(torch.tensor(state, dtype=torch.float64))


class Divergence:
    """The first step with NaN or inf in its loss or weights; it stays on the device until it is read."""

    _NEVER = 2**62

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), self._NEVER, dtype=torch.int64, device=device)

    def note(self, step: int, *values: Tensor) -> None:
        """Check a step's losses or weights."""
        finite = torch.stack([value.isfinite().all() for value in values]).all()
        self._first = torch.where(finite, self._first, self._first.clamp(max=step))

    def first_step(self) -> int | None:
        """The first such step of all processes, or None; a collective call, which synchronizes the device."""
        first = int(all_reduce_min(self._first.clone()))
        return None if first == self._NEVER else first


class EachOnce:
    """Counts how often each image of a split was evaluated, over all processes."""

    def __init__(self, images: int, device: torch.device) -> None:
        self._counts, self._device = torch.zeros(images, dtype=torch.int32), device

    def add(self, index: Tensor) -> None:
        """Add a batch's positions in the split, int64 [B], on the CPU."""
        self._counts += torch.bincount(index, minlength=len(self._counts)).to(torch.int32)

    def check(self) -> None:
        """Raise a RuntimeError unless every image was evaluated exactly once."""
        counts = all_reduce_sum(self._counts.to(self._device))
        missed, repeated = int((counts == 0).sum()), int((counts > 1).sum())
        if missed or repeated:
            raise RuntimeError(
                f"of {len(counts)} images, {missed} were not evaluated and {repeated} were evaluated more than once: "
                f"accuracies would be wrong and are not reported"
            )
