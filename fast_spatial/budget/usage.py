"""A budget, and the meter that counts its use over all starts of a command.

Hours count the running time of `launch.py`, start-up and calibration included, without the time between two starts.
The seconds are written to the run's folder every second, so that the time of a killed process counts too.
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

from fast_spatial.config.budget_policy import DEFAULT_POLICY, BudgetPolicy
from fast_spatial.config.fields import flag
from fast_spatial.config.train import BudgetOptions
from fast_spatial.errors import UserError
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.run_files import USAGE


@dataclass(frozen=True)
class Budget:
    """A budget in hours, or until a wall-clock time.

    Attributes:
        flag: the flag and its value, as given.
        hours: running time over all starts; None with `moment`.
        moment: the wall-clock time of the end; None with `hours`.
        gpus: number of GPUs over all nodes; 0 on CPUs.

    """

    flag: str
    hours: float | None
    moment: datetime.datetime | None
    gpus: int

    def until(self, usage: UsageMeter) -> float:
        """The end, in seconds of `time.monotonic()`."""
        if self.hours is not None:
            return usage.started - usage.used_before_sec + 3600 * self.hours
        assert self.moment is not None
        return time.monotonic() + (self.moment - datetime.datetime.now(datetime.UTC)).total_seconds()


def budget_of(options: BudgetOptions, gpus: int, moment: datetime.datetime | None = None) -> Budget:
    """The budget of a command's options.

    Args:
        options: options with one budget.
        gpus: number of GPUs over all nodes.
        moment: the end by `--until`, if it is resolved already.

    Raises:
        UserError: on GPU-hours without a GPU, or a time that is past or invalid.

    """
    if options.until:
        return Budget(f"--until {options.until}", None, moment or moment_of(options.until), gpus)
    if options.hours is not None:
        return Budget(f"--hours {options.hours:g}", options.hours, None, gpus)
    name = "gpu_hours" if options.gpu_hours else "max_cost"
    value = getattr(options, name)
    given = f"{flag(name)} {value:g}"
    if not gpus:
        raise UserError(f"{given}: requires a GPU, and none is visible", "give --hours or --until instead")
    gpu_hours = value if name == "gpu_hours" else value / options.price
    return Budget(given, gpu_hours / gpus, None, gpus)


def moment_of(text: str, now: datetime.datetime | None = None) -> datetime.datetime:
    """Parse a time of day (its next occurrence), or a date and time; by default in this machine's time zone.

    Raises:
        UserError: if the text is invalid, or the time is past.

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
        raise UserError(f"--until {text}: this time is past", "give a later time")
    return found


class UsageMeter:
    """Counts the running time of a run, earlier starts included, while it is open.

    Args:
        folder: the run's folder; created.
        started: `time.monotonic()` at the start of this process.
        writes: whether the running time counts, and is written; a plan alone uses nothing.
        policy: the interval between two records.

    Raises:
        UserError: if the record cannot be read or written.

    """

    def __init__(
        self, folder: Path, started: float, *, writes: bool = True, policy: BudgetPolicy = DEFAULT_POLICY
    ) -> None:
        self.started, self._interval_sec = started, policy.usage_interval_sec
        self._file, self._writes = folder / USAGE, writes
        self._parts = _parts(self._file)
        # A killed process ran for up to one interval after its last record.
        self.used_before_sec = sum(
            part["seconds"] + (0.0 if part["ended"] else self._interval_sec) for part in self._parts
        )
        self._since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write_at_intervals, name="usage", daemon=True)

    @property
    def used_sec(self) -> float:
        """Running time until now, in seconds."""
        return self.used_before_sec + time.monotonic() - self.started

    def __enter__(self) -> UsageMeter:
        if self._writes:
            try:
                self._write(ended=False)
            except OSError as error:
                raise UserError(f"--out {self._file.parent}: cannot be written ({error.strerror})") from None
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._writes:
            self._closing.set()
            self._thread.join()
            with contextlib.suppress(OSError):  # must not hide an earlier exception
                self._write(ended=True)

    def _write_at_intervals(self) -> None:
        while not self._closing.wait(self._interval_sec):
            with contextlib.suppress(OSError):  # such as a full disk, which the run's own files report
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
            f"{file}: cannot be read ({error}), so the used part of the budget is unknown",
            "name a new folder, or remove the file to restart the budget",
        ) from None
