"""Stop signals: recorded, then acted on at a point where nothing is lost."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Sent by schedulers, terminals and torchrun. SIGUSR1 is the customary warning of Slurm before the time limit.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """Exit of a process after a stop signal, with the exit status of shells: 128 + signal number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return signal.Signals(self.signal_number).name


class StopRequest:
    """The number of the first stop signal that this process received, or 0."""

    def __init__(self) -> None:
        self.signal_number = 0

    def receive(self, signal_number: int, _: FrameType | None) -> None:
        """Record a signal."""
        self.signal_number = self.signal_number or signal_number

    def obey(self) -> None:
        """Raise `Stopped` if a signal was received."""
        if self.signal_number:
            raise Stopped(self.signal_number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Record stop signals instead of ending the process; only in its main thread.

    Raises:
        Stopped: at the end, if a signal came too late to be obeyed before, so that no other work begins.

    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # such as SIGHUP under nohup
                signal.signal(number, request.receive)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    request.obey()


def stop_with_parent() -> None:
    """Send this process SIGTERM when its parent dies, even of SIGKILL, so that no run is orphaned."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
