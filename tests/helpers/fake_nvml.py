"""A stand-in for the package `pynvml` and two GPUs."""

from __future__ import annotations


class FakeNvml:
    """GPUs by UUID, with their counters in millijoules (None: no counter).

    Attributes:
        starts: whether the driver answers.
        lost: UUID of a GPU that has fallen off the bus.

    """

    class NVMLError(Exception):
        """The error of all calls."""

    def __init__(self, counters: dict[str, int | None]) -> None:
        self.counters, self.starts, self.lost = counters, True, ""

    def nvmlInit(self) -> None:
        self._need(self.starts)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.counters)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self.nvmlDeviceGetHandleByUUID(f"GPU-{list(self.counters)[index]}")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        name = uuid.removeprefix("GPU-")
        self._need(uuid.startswith("GPU-") and name in self.counters and name != self.lost)
        return name

    def nvmlDeviceGetName(self, handle: str) -> str:
        return f"GPU {handle}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        counter = self.counters[handle]
        self._need(counter is not None)
        assert counter is not None
        return counter

    def _need(self, condition: bool) -> None:
        if not condition:
            raise self.NVMLError
