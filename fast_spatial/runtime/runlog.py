"""Output of a run on rank 0: progress bar, one JSON record per epoch and evaluation, TensorBoard scalars."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from fast_spatial.errors import UserError
from fast_spatial.runtime.energy import EnergyMeter, local_gpus
from fast_spatial.runtime.run_files import LOG, TENSORBOARD
from fast_spatial.runtime.waiting import Clock, HostClock

# A stopping process may still be writing its last checkpoint.
_LOCK_PATIENCE_SEC = 30.0


class Bar:
    """Iterates over batches with a progress bar (on rank 0, on a terminal) and measures the wait for data.

    Args:
        batches: the batches to iterate over.
        total: number of batches, earlier ones included.
        images_per_batch: images per batch, over all processes.
        title: text in front of the bar.
        show: whether to show the bar.
        initial: number of batches done earlier.
        wait: clock of the data wait.

    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        total: int,
        images_per_batch: int,
        title: str,
        show: bool,
        initial: int = 0,
        wait: Clock | None = None,
    ) -> None:
        self._batches, self._images_per_batch = batches, images_per_batch
        layout = "{desc} {percentage:3.0f}% |{bar:16}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
        self._bar = tqdm(
            total=total, initial=initial, desc=title, bar_format=layout, disable=None if show else True, leave=False
        )
        self._wait = wait or HostClock()
        self.steps = 0
        self._in_step = False
        self._start = time.perf_counter()

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._batches)
        while True:
            self._wait.start()
            try:
                batch = next(iterator)
            except StopIteration:
                break
            self._wait.stop()
            self._in_step = True
            yield batch
            self._count()
        self.close()

    def close(self) -> None:
        """Count the last batch as done and remove the bar; for loops that end early."""
        self._count()
        self._bar.close()

    def _count(self) -> None:
        if self._in_step:
            self.steps, self._in_step = self.steps + 1, False
            self._bar.update()

    @property
    def images_per_sec(self) -> float:
        """Images per second over all processes, since the start."""
        return self.steps * self._images_per_batch / max(time.perf_counter() - self._start, 1e-9)

    @property
    def data_wait_pct(self) -> float:
        """Percentage of the time that the device waited for the loader."""
        return 100 * self._wait.seconds / max(time.perf_counter() - self._start, 1e-9)

    def show(self, **values: float) -> None:
        """Show numbers beside the bar."""
        if not self._bar.disable:
            shown = {name: f"{value:.4g}" for name, value in values.items()}
            rates = {"img/s": f"{self.images_per_sec:.0f}", "data wait": f"{self.data_wait_pct:.0f}%"}
            self._bar.set_postfix(shown | rates)


class RunLog:
    """`log.jsonl` and TensorBoard scalars of a run's folder; ranks other than 0 write nothing.

    Opening it locks the folder: two processes that write the same run would corrupt it.

    Raises:
        UserError: if another process has locked the folder, or it cannot be written.

    """

    def __init__(self, out: Path, *, rank: int, gpus: int) -> None:
        self._active, self._gpus, self._out = rank == 0, gpus, out
        self._start = time.time()
        self._board: Any = None
        self._meter = EnergyMeter(local_gpus(gpus) if self._active else [])
        if self._active:
            try:
                out.mkdir(parents=True, exist_ok=True)
                self._file = open(out / LOG, "a", encoding="utf-8")  # noqa: SIM115  (closed by `close`)
            except OSError as error:
                raise UserError(f"--out {out}: cannot be written ({error.strerror})", "choose another folder") from None
            _lock(self._file, out)

    def begin(self, *, elapsed_sec: float = 0.0, size: int = 0, step: int = 0) -> None:
        """Continue the log from a checkpoint. Records that a killed run wrote after it are removed.

        Args:
            elapsed_sec: seconds of use at the checkpoint.
            size: size of `log.jsonl` at the checkpoint, bytes.
            step: steps done at the checkpoint.

        """
        self._start = time.time() - elapsed_sec
        if self._active:
            from torch.utils.tensorboard import SummaryWriter

            before = os.fstat(self._file.fileno()).st_size
            if before and not size:
                say(f"found a log without a checkpoint in {self._out}; starting from scratch")
            self._file.truncate(min(size, before))
            self._board = SummaryWriter(str(self._out / TENSORBOARD), purge_step=step + 1)  # drops later steps

    @property
    def size(self) -> int:
        """Size of `log.jsonl` in bytes, after flushing it and TensorBoard's files."""
        if not self._active:
            return 0
        self._board.flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    @property
    def elapsed_sec(self) -> float:
        """Seconds of use, earlier parts of the run included."""
        return time.time() - self._start

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours of use."""
        return self.elapsed_sec / 3600 * self._gpus

    def record(self, event: str, step: int, **values: Any) -> None:
        """Write one record and its numbers as scalars, and print a line."""
        self.note(event, step, **values)
        if self._active:
            shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items() if v is not None)
            say(f"{event}: " + ", ".join(shown))

    def note(self, event: str, step: int, **values: Any) -> None:
        """Write one record, and its numbers as scalars.

        `energy_kwh`, where available, is the energy of this machine's GPUs since the previous record or the start of
        this process. Energy that a killed run used after its last record is not logged.
        """
        if not self._active:
            return
        energy_kwh = self._meter.take_kwh()
        line = {
            "event": event,
            **values,
            "elapsed_sec": round(self.elapsed_sec, 2),
            "gpu_hours": round(self.gpu_hours, 5),
            **({} if energy_kwh is None else {"energy_kwh": round(energy_kwh, 6)}),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.scalars(event, step, **values)

    def scalars(self, group: str, step: int, **values: Any) -> None:
        """Write TensorBoard scalars only."""
        if self._active:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Flush and close the files; unlocks the folder."""
        if self._board is not None:
            self._board.close()
        if self._active:
            self._file.close()


def _lock(file: IO[str], out: Path) -> None:
    """Lock a run's folder for as long as the file is open."""
    deadline = time.monotonic() + _LOCK_PATIENCE_SEC
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--out {out}: another process is writing this run", "stop that process, or choose another folder"
                ) from None
            time.sleep(0.2)
            continue
        except OSError:  # a file system without locks
            say(f"cannot lock {out}: make sure that no other process writes this run")
        return


def say(text: str) -> None:
    """Print a line, above any progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
