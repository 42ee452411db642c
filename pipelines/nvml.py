"""NVIDIA's management library (NVML), which tells about GPUs without initializing CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def gpus_and_driver() -> tuple[list[str], str] | None:
    """The models of this machine's GPUs and the version of their driver; None without a driver."""
    nvml = _connected()
    if nvml is None:
        return None
    try:
        count, driver = nvml.nvmlDeviceGetCount(), nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError:
        return None
    return [name for index in range(count) if (name := _name(nvml, index))], driver


def energy_joules(uuids: Sequence[str]) -> float | None:
    """Energy that GPUs used since the driver was loaded, in joules.

    Args:
        uuids: UUIDs of the GPUs, as in torch.

    Returns:
        The sum; None without GPUs or driver, or if a GPU has no counter.

    """
    nvml = _connected() if uuids else None
    if nvml is None:
        return None
    try:
        gpus = [nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") for uuid in uuids]
        millijoules: int = sum(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in gpus)
    except nvml.NVMLError:
        return None
    return millijoules / 1000


def _connected() -> Any:
    """The package `pynvml`, connected to the driver; None if either is missing."""
    try:
        import pynvml
    except ImportError:  # an environment older than this requirement
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _name(nvml: Any, index: int) -> str | None:
    try:
        return str(nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index)))
    except nvml.NVMLError:  # one lost GPU does not hide the others
        return None
