"""A training run's folder: its lock, log, checkpoints and identity."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fast_spatial.config.fields import differences, identity, to_json, todays_names
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.decoders import keep_failure, previous_placement
from fast_spatial.data.placing import placement_of
from fast_spatial.errors import UserError
from fast_spatial.models import checkpoint
from fast_spatial.pipelines.dataset import ImageIndex
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.environment import COMMAND_VARIABLE, environment
from fast_spatial.runtime.files import write_json
from fast_spatial.runtime.run_files import CONFIG, ENVIRONMENT, LOG, PREVIOUS
from fast_spatial.runtime.runlog import RunLog, say
from fast_spatial.training.checkpoints import Saver, find_latest
from fast_spatial.training.schedule import Segment, Timeline
from fast_spatial.training.state import Position, TrainState


def identity_of(
    config: TrainConfig, dtype: torch.dtype, train_images: ImageIndex, val_images: ImageIndex, timeline: Timeline
) -> dict[str, Any]:
    """All that decides the numbers of a run, by the names that messages use; a part of every checkpoint."""
    about = {
        "recipe": identity(config),
        "dtype": str(dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype,
        "training images": train_images.fingerprint(),
        "validation images": val_images.fingerprint(),
    }
    if config.replay:
        about["replay"] = f"{len(timeline.segments)} segments, {timeline.end} steps"
    return about


class RunFolder:
    """The folder of a training in progress. Rank 0 alone writes to it, except for lists of bad images.

    Entering it creates and locks the folder.

    Args:
        config: the options of the training.
        world: this process and its group.
        classes: names of the classes, for the checkpoints.
        about: the run's identity, of `identity_of`.

    Attributes:
        out: the folder.
        log: the run's log, while the folder is open.
        best_pct: accuracy of `best.pt`, percent; -1 before the first evaluation.

    """

    def __init__(self, config: TrainConfig, world: World, classes: tuple[str, ...], about: dict[str, Any]) -> None:
        self.out, self.best_pct = Path(config.out), -1.0
        self._damaged: list[Path] = []
        self._config, self._world, self._classes, self._identity = config, world, classes, about
        self._saver: Saver | None = None
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> RunFolder:
        gpus = self._world.world_size if self._world.device.type == "cuda" else 0
        with contextlib.ExitStack() as opened:
            self.log = opened.enter_context(contextlib.closing(RunLog(self.out, rank=self._world.rank, gpus=gpus)))
            if self._world.rank == 0:  # only under the lock: it removes what a killed process left behind
                self._saver = opened.enter_context(contextlib.closing(Saver(self.out)))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._opened.close()

    def find_saved(self) -> dict[str, Any] | None:
        """The newest intact checkpoint of this run, or None.

        Raises:
            UserError: if the folder holds another run, or no checkpoint can be read.

        """
        distributed.barrier()  # rank 0 has locked the folder, and no process writes to it: all may read
        saved, self._damaged = find_latest(self.out)
        if saved is not None:
            check_same_run(saved["identity"], self._identity, self._config)
            self.best_pct = saved["best_pct"]
        return saved

    def begin(self, saved: dict[str, Any] | None, position: Position) -> None:
        """Continue the log at a position, and record the options and the environment.

        Raises:
            UserError: if the processes differ in what decides the numbers.

        """
        config = self._config
        evenly = {"--log-every and --eval-every": [config.log_every, config.eval_every]}
        check_processes_agree(self._world, {"position": position.steps_done, **self._identity, **evenly})
        if saved is None:
            self.log.begin()
        else:
            self.log.begin(elapsed_sec=saved["elapsed_sec"], size=saved["log_size"], step=position.steps_done)
        if self._saver is None:
            return
        write_json(self.out / CONFIG, to_json(config))
        warp = placement_of(config, self._world, exact=config.deterministic).warp
        if saved is not None:
            say_changed_placement(self.out, self._world, position.steps_done, warp)
        record_environment(self.out, config, self._world, position.steps_done, warp)
        for path in self._damaged:
            say(f"{path} is damaged: resuming from the earlier {PREVIOUS}")
        self._saver.set_aside(self._damaged)

    def save(
        self,
        state: TrainState,
        position: Position,
        timeline: Timeline,
        sums: dict[str, Any],
        *,
        best: bool = False,
    ) -> None:
        """Save a checkpoint; the writing goes on in the background.

        Args:
            state: what is trained.
            position: its position.
            timeline: the planned progress.
            sums: the running sums of the epoch, over all processes.
            best: save as `best.pt`, too.

        Raises:
            UserError: if the previous checkpoint could not be written.

        """
        if self._saver is None:
            return
        content = {
            "format": checkpoint.FORMAT,
            "arch": self._config.arch,
            "classes": list(self._classes),
            "config": to_json(self._config),
            "identity": self._identity,
            "epoch": position.epoch,
            "step": position.step,
            "steps": position.steps_done,
            "segments": [list(segment) for segment in timeline.segments],
            "best_pct": self.best_pct,
            "elapsed_sec": self.log.elapsed_sec,
            "log_size": self.log.size,
            "world_size": self._world.world_size,
            **sums,
            **state.state_dict(),
        }
        self._saver.save(content, best=best)

    def is_best(self, top1_pct: float | None) -> bool:
        """Whether an accuracy, percent, is above all before it; the highest is kept."""
        assert top1_pct is not None
        is_best, self.best_pct = top1_pct > self.best_pct, max(top1_pct, self.best_pct)
        return is_best

    def note_failed_decoding(self, what: str, position: Position) -> None:
        """Record that this process's GPU failed to decode. Ranks other than 0 have files of their own."""
        say(what)
        self.log.note("decoding", position.steps_done, steps_before=position.steps_done, what=what)
        if self._world.rank:
            keep_failure(self.out, self._world.rank, what, position.steps_done)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk."""
        if self._saver is not None:
            self._saver.wait()


def read_segments(run: str) -> list[Segment]:
    """The timeline's segments of a training with a budget, from its log.

    Raises:
        UserError: if the log cannot be read, or has no segments.

    """
    try:
        records = [json.loads(line) for line in (Path(run) / LOG).read_text(encoding="utf-8").splitlines()]
        found = [Segment(r["start"], r["progress"], r["end"]) for r in records if r["event"] == "segment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--replay {run}: cannot read {LOG} ({error})", "give the folder of a training run") from None
    if not found:
        raise UserError(
            f"--replay {run}: that training had no budget, so there is no plan to replay",
            "remove --replay: the same flags and seed train the same model",
        )
    return found


def check_same_run(there: dict[str, Any], here: dict[str, Any], config: TrainConfig) -> None:
    """Raise a UserError if the saved identity `there` differs from `here`, the identity of this command."""
    given, saved = ({**todays_names(about["recipe"]), **about} for about in (here, there))
    del given["recipe"]
    if changed := differences(saved, given):
        advice = "choose another folder"
        if config.dtype == "auto" and saved["dtype"] != given["dtype"]:
            advice = f"add --dtype {saved['dtype']} (not this machine's default), or {advice}"
        raise UserError(f"--out {config.out}: contains a run with different settings ({changed})", advice)


def check_processes_agree(world: World, about: dict[str, Any]) -> None:
    """Raise a UserError if the processes differ in a value of `about`."""
    for name, value in about.items():
        if not distributed.all_equal(zlib.crc32(json.dumps(value).encode()), world.device):
            raise UserError(
                f"the processes differ in {name}: this process has {value}",
                "run the same command on all nodes, with the same images, and --out on a shared disk",
            )


def say_changed_placement(out: Path, world: World, done: int, warp: str) -> None:
    """Print where a resumed run decodes or warps in another place than before."""
    decoded_by, warped_by = previous_placement(out / ENVIRONMENT)
    if world.decoding is not None and decoded_by not in (None, world.decoding.decoding):
        say(f"decoding changed at step {done}: from {decoded_by} to {world.decoding.decoding}")
    if warped_by not in (None, warp):
        say(f"warp changed at step {done}: from {warped_by} to {warp}")


def record_environment(out: Path, config: TrainConfig, world: World, done: int, warp: str) -> None:
    """Append a line to OUT/environment.jsonl: command, options, hardware and first step of this part of the run."""
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
