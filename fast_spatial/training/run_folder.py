"""A training run on disk: written whole, in the background, the checkpoint before kept; found again after a crash."""

from __future__ import annotations

import datetime
import io
import json
import os
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fast_spatial.config.fields import differences, to_json, todays_names
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.models import checkpoint
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.environment import COMMAND_VARIABLE, environment
from fast_spatial.runtime.files import remove_leftovers, write_atomically
from fast_spatial.runtime.run_files import BEST, ENVIRONMENT, LAST, LOG, PREVIOUS
from fast_spatial.training.schedule import Segment


class Saver:
    """Writes a run's checkpoints: `last.pt`, the one before it as `previous.pt`, and `best.pt`.

    A state is copied to host memory when it is handed over; a thread writes it while training goes on. Whatever goes
    wrong there is raised by the next call.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._writing: Future[None] | None = None
        for name in (LAST, BEST):
            remove_leftovers(out / name)

    def save(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Save a state of tensors and plain values; `best` also as the best so far.

        Raises:
            UserError: if the state before it could not be written.

        """
        self.wait()
        self._writing = self._thread.submit(self._write, _snapshot(state), best)

    def set_aside(self, damaged: list[Path]) -> None:
        """Rename damaged checkpoints, so that none takes the place of a good one; nobody may be reading them now."""
        for path in damaged:
            path.replace(path.with_name(f"{path.name}.damaged"))

    def wait(self) -> None:
        """Return once all is on the disk.

        Raises:
            UserError: if it could not be written.

        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except OSError as error:
            kept = [name for name in (LAST, PREVIOUS) if (self._out / name).is_file()]
            whole = f"; {kept[0]}, saved before, is whole" if kept else ""
            raise UserError(
                f"--out {self._out}: a checkpoint cannot be written ({error.strerror or error}){whole}",
                "make room, or make the folder writable; then the same command continues from there",
            ) from error

    def close(self) -> None:
        """Let the writing come to its end, well or not."""
        self._thread.shutdown()

    def _write(self, state: dict[str, Any], best: bool) -> None:
        buffer = io.BytesIO()  # torch's own writer turns an error of the file into one that does not name it
        torch.save(state, buffer)
        content = buffer.getbuffer()
        if best:  # first: a run continues from last.pt, and would not judge this epoch again
            write_atomically(self._out / BEST, lambda file: file.write(content))
        last = self._out / LAST
        write_atomically(last, lambda file: file.write(content), keep=self._out / PREVIOUS)


class CheckpointTimer:
    """Says once when so many steps, or seconds, have passed since it said so last; 0: never."""

    def __init__(self, steps: int, seconds: float) -> None:
        self._steps, self._seconds, self._since = steps, seconds, time.monotonic()

    def __call__(self, step: int) -> bool:
        """Whether it is time after a step, counted from the start of the run."""
        if self._steps:
            return step % self._steps == 0
        if not self._seconds or time.monotonic() - self._since < self._seconds:
            return False
        self._since = time.monotonic()
        return True


class Found(NamedTuple):
    """A run's newest whole checkpoint (None: none was saved), and newer ones that are damaged."""

    state: dict[str, Any] | None
    damaged: list[Path]


def find_latest(out: Path) -> Found:
    """The newest whole checkpoint of a run's folder.

    Raises:
        UserError: if there are checkpoints, but none that can be read.

    """
    damaged: list[Path] = []
    for path in (out / LAST, out / PREVIOUS):
        if not path.is_file():
            continue
        if not os.access(path, os.R_OK):
            raise UserError(
                f"--out {out}: {path.name} cannot be read by this user", "change that, or name a new folder"
            )
        try:
            return Found(checkpoint.load(path), damaged)
        except checkpoint.DamagedCheckpoint:
            damaged.append(path)
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise checkpoint.DamagedCheckpoint(f"--out {out}: its checkpoints ({names}) are damaged", "name a new folder")
    if (out / BEST).is_file():
        raise UserError(
            f"--out {out}: it holds {BEST}, but no {LAST} to continue from", f"name a new folder, or move {BEST} away"
        )
    return Found(None, [])


def read_segments(run: str) -> list[Segment]:
    """The segments of a training that kept to a budget, from its log.

    Raises:
        UserError: if there are none.

    """
    try:
        records = [json.loads(line) for line in (Path(run) / LOG).read_text(encoding="utf-8").splitlines()]
        found = [Segment(r["start"], r["progress"], r["end"]) for r in records if r["event"] == "segment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--replay {run}: its {LOG} cannot be read ({error})", "name a folder of train") from None
    if not found:
        raise UserError(
            f"--replay {run}: that training kept to no budget, so there is nothing to repeat",
            "without --replay, the same flags and seed train the same model",
        )
    return found


def check_same_run(there: dict[str, Any], here: dict[str, Any], config: TrainConfig) -> None:
    """Raise a UserError if a checkpoint is of another run than what would go on here."""
    given, saved = ({**todays_names(about["recipe"]), **about} for about in (here, there))
    del given["recipe"]
    if changed := differences(saved, given):
        advice = "choose another folder"
        if config.dtype == "auto" and saved["dtype"] != given["dtype"]:
            advice = f"add --dtype {saved['dtype']}, which is not what this machine is best at, or {advice}"
        raise UserError(f"--out {config.out}: contains a run with different settings ({changed})", advice)


def check_processes_agree(world: World, about: dict[str, Any]) -> None:
    """Raise a UserError if this process would not do the same as the others."""
    for name, value in about.items():
        if not distributed.all_equal(zlib.crc32(json.dumps(value).encode()), world.device):
            raise UserError(
                f"the processes differ in their {name}: {value} here",
                "give the same command on all nodes, with the same images, and --out on a disk that they share",
            )


def record_environment(out: Path, config: TrainConfig, world: World, done: int, warp: str) -> None:
    """Add a line to OUT/environment.jsonl: what this part of the run was started with, on, and after which step."""
    about = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "steps_before": done,
        "command": os.environ.get(COMMAND_VARIABLE),
        "world_size": world.world_size,
        "config": to_json(config),
        "decoding": world.decoding.to_json() if world.decoding else None,
        "exact_decoding": world.exact_decoding.to_json() if world.exact_decoding else None,
        "warp": warp,
        **environment(),
    }
    with open(out / ENVIRONMENT, "a", encoding="utf-8") as file:
        file.write(json.dumps(about) + "\n")


def _snapshot(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_snapshot(item) for item in value)
    return value
