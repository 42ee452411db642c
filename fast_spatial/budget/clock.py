"""A budget: how long a command may take, over all its starts, and the clock that counts that.

Hours count time in use: the seconds that `launch.py` ran, start-up and measuring included, are written to the run's
folder every second, so that a process that was killed is counted, too. The time between two starts is not.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fast_spatial.config.fields import flag
from fast_spatial.config.train import BudgetOptions
from fast_spatial.errors import UserError
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.run_files import USAGE

_BEAT_SEC = 1.0


@dataclass(frozen=True)
class Budget:
    """What may be used: hours, or the time until a moment.

    Attributes:
        asked: the flag and its value, as they were given.
        hours: in use, over all starts; None with a moment.
        moment: of the clock; None with hours.
        gpus: over all nodes; 0 without.

    """

    asked: str
    hours: float | None
    moment: datetime.datetime | None
    gpus: int

    def until(self, clock: Clock) -> float:
        """The end, in seconds of `time.monotonic()`."""
        if self.hours is not None:
            return clock.started - clock.used_before_sec + 3600 * self.hours
        assert self.moment is not None
        return time.monotonic() + (self.moment - datetime.datetime.now(datetime.UTC)).total_seconds()


def budget_of(options: BudgetOptions, gpus: int, known_moment: str | None = None) -> Budget:
    """The budget that options name.

    Args:
        options: with one of the budgets.
        gpus: over all nodes.
        known_moment: of `--until`, as an earlier start of the same command understood it.

    Raises:
        UserError: on GPU-hours without a GPU, or a time that is over or cannot be read.

    """
    if options.until:
        moment = datetime.datetime.fromisoformat(known_moment) if known_moment else moment_of(options.until)
        return Budget(f"--until {options.until}", None, moment, gpus)
    if options.hours is not None:
        return Budget(f"--hours {options.hours:g}", options.hours, None, gpus)
    name = "gpu_hours" if options.gpu_hours else "max_cost"
    value = getattr(options, name)
    asked = f"{flag(name)} {value:g}"
    if not gpus:
        raise UserError(f"{asked}: it counts hours of GPUs, and none is visible", "give --hours, or --until")
    gpu_hours = value if name == "gpu_hours" else value / options.price
    return Budget(asked, gpu_hours / gpus, None, gpus)


def moment_of(text: str, now: datetime.datetime | None = None) -> datetime.datetime:
    """The next time of the clock, or the date and time, that a text names; in this machine's time zone, unless it says.

    Raises:
        UserError: if it cannot be read, or is over.

    """
    now = (now or datetime.datetime.now()).astimezone()
    try:
        time_of_day = datetime.time.fromisoformat(text)
    except ValueError:
        try:
            found = datetime.datetime.fromisoformat(text).astimezone()
        except ValueError:
            raise UserError(f"--until {text}: expected a time, as in 18:30 or 2030-01-31T06:00") from None
    else:
        today = now.astimezone(time_of_day.tzinfo)
        found = datetime.datetime.combine(today, time_of_day).astimezone()
        if found <= now:
            found = datetime.datetime.combine(today + datetime.timedelta(days=1), time_of_day).astimezone()
    if found <= now:
        raise UserError(f"--until {text}: that is over")
    return found


class Clock:
    """Counts the seconds in use of a run's folder, while it is open, on top of those of earlier starts.

    Args:
        folder: of the run; created.
        started: `time.monotonic()` at the start of this process.
        writes: whether this process keeps the record; on several nodes, one does.

    Raises:
        UserError: if there is a record that cannot be read, or none can be written.

    """

    def __init__(self, folder: Path, started: float, *, writes: bool = True) -> None:
        self.started = started
        self._file, self._writes = folder / USAGE, writes
        self._parts = _parts(self._file)
        # A start that did not come to its end ran on for a moment after the last time that it was heard of.
        self.used_before_sec = sum(part["seconds"] + (0.0 if part["ended"] else _BEAT_SEC) for part in self._parts)
        self._since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="clock", daemon=True)

    @property
    def used_sec(self) -> float:
        """Seconds in use until now."""
        return self.used_before_sec + time.monotonic() - self.started

    def __enter__(self) -> Clock:
        if self._writes:
            try:
                self._write(ended=False)
            except OSError as error:
                raise UserError(f"--out {self._file.parent}: it cannot be written ({error.strerror})") from None
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._writes:
            self._closing.set()
            self._thread.join()
            with contextlib.suppress(OSError):  # what went wrong before it is to be told
                self._write(ended=True)

    def _beat(self) -> None:
        while not self._closing.wait(_BEAT_SEC):
            with contextlib.suppress(OSError):  # a full disk, say; what cannot do without it will tell
                self._write(ended=False)

    def _write(self, *, ended: bool) -> None:
        seconds = round(time.monotonic() - self.started, 2)
        write_json(self._file, {"parts": [*self._parts, {"started": self._since, "seconds": seconds, "ended": ended}]})


def _parts(file: Path) -> list[dict[str, float]]:
    if not file.is_file():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["parts"]
        for part in found:
            part["seconds"] + part["ended"]
        return list(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: it cannot be read ({error}), so nobody knows how much of the budget is used",
            "name a new folder, or remove the file to begin the budget anew",
        ) from None
