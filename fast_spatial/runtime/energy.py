"""Energy use of GPUs, from the counters of NVIDIA's driver (NVML)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

_JOULES_PER_KWH = 3.6e6


class EnergyMeter:
    """Energy used by this machine's GPUs between two readings.

    Args:
        uuids: UUIDs of the GPUs, as in torch; empty without GPUs.

    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self._uuids = uuids
        self._before = gpu_energy_joules(uuids)

    def take_kwh(self) -> float | None:
        """Energy used since the last call, in kWh; None if unknown."""
        now = gpu_energy_joules(self._uuids)
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


def gpu_energy_joules(uuids: Sequence[str]) -> float | None:
    """Energy used since the driver was loaded, in joules; None without NVML or if a GPU has no counter."""
    if not uuids:
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    total = 0
    for uuid in uuids:
        device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        if nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(device)) != 0:
            return None
        if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)) != 0:
            return None
        total += millijoules.value
    return total / 1000
