"""Energy use of GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from fast_spatial.pipelines.nvml import energy_joules

_JOULES_PER_KWH = 3.6e6


class EnergyMeter:
    """Energy used by this machine's GPUs between two readings.

    Args:
        uuids: UUIDs of the GPUs, as in torch; empty without GPUs.

    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self._uuids = uuids
        self._before = energy_joules(uuids)

    def take_kwh(self) -> float | None:
        """Energy used since the last call, in kWh; None if unknown."""
        now = energy_joules(self._uuids)
        before, self._before = self._before, now
        return None if now is None or before is None else (now - before) / _JOULES_PER_KWH


def local_gpus(count: int) -> list[str]:
    """The UUIDs of `count` GPUs; empty if this machine has fewer."""
    if not count:
        return []
    import torch

    if count > torch.cuda.device_count():
        return []
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]
