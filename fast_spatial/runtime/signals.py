"""Signals that ask a process to stop: remembered, and acted on where nothing is lost."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What schedulers, terminals and torchrun send; SIGUSR1 is Slurm's customary warning before the time is up.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """The end of a process that was asked to stop, with the exit status that shells give it: 128 + the signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return signal.Signals(self.signal_number).name


class StopRequest:
    """Whether this process was asked to stop: the first signal's number, or 0."""

    def __init__(self) -> None:
        self.signal_number = 0

    def receive(self, signal_number: int, _: FrameType | None) -> None:
        """Remember a signal."""
        self.signal_number = self.signal_number or signal_number

    def obey(self) -> None:
        """Raise `Stopped` if there was a signal."""
        if self.signal_number:
            raise Stopped(self.signal_number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Collect the signals that ask to stop, instead of dying of them; only in a process's main thread."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, request.receive)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_with_parent() -> None:
    """Ask this process to stop when its parent dies, even of SIGKILL, so that no run goes on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
