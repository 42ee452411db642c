"""Probing the decoders: before the first batch, with one result for all processes, which is recorded."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fast_spatial.config.commands import CalibrateConfig
from fast_spatial.config.fields import from_json
from fast_spatial.config.train import TrainConfig
from fast_spatial.pipelines.inspection.probe import Choice, choose
from fast_spatial.pipelines.placement import HW_DECODER_LOAD, RUNGS, Decoding
from fast_spatial.runtime import distributed
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.run_files import DECODING_FAILURES
from fast_spatial.runtime.runlog import say

# Upper bound for probing all rungs. The other processes of a machine wait for the one that probes.
_PROBE_MINUTES = 5.0


def find_decoding(config: Any, world: World) -> World:
    """`world` with the decoding for all processes: the lowest rung that any process found.

    Training may use the GPU's JPEG engine. Its evaluations may not, so their decoding is probed as well.

    Args:
        config: the options of a training, an evaluation, a landscape or a calibration.
        world: this process and its group.

    """
    if isinstance(config, CalibrateConfig):
        config = from_json(TrainConfig, config.trainings[0])
    exact = not isinstance(config, TrainConfig) or config.deterministic
    distributed.reset_watchdog(config.stall_minutes + _PROBE_MINUTES)
    begun = time.monotonic()
    find = partial(choose, "cpu" if config.warp == "numba" else config.decode, on_gpu=world.device.type == "cuda")
    own = find(hw_decoder_load=0.0 if exact else HW_DECODER_LOAD)
    own_exact = find(hw_decoder_load=0.0) if own.decoding.hw_decoder_load else own
    probe_sec = time.monotonic() - begun
    chosen, chosen_exact = _lowest(own, world), _lowest(own_exact, world)
    if world.rank == 0 and world.device.type == "cuda":
        say(chosen.message)
        if chosen_exact.decoding.on != chosen.decoding.on:
            say(f"for evaluations, {chosen_exact.message}")
    distributed.reset_watchdog(config.stall_minutes)
    return replace(world, decoding=chosen, exact_decoding=chosen_exact, probe_sec=probe_sec)


def _lowest(own: Choice, world: World) -> Choice:
    """The lowest rung of all processes' choices."""
    found: list[Choice] = distributed.gather(own)
    rank = max(range(len(found)), key=lambda rank: RUNGS.index(found[rank].decoding), default=0)  # on rank 0
    rung = distributed.broadcast(RUNGS.index(found[rank].decoding) if found else 0, world.device)
    if RUNGS[rung] == own.decoding:
        return own
    why = f"limited by process {rank}: {found[rank].why}" if found else "limited by another process"
    return Choice(RUNGS[rung], why, own.trials)


def keep_failure(out: Path, rank: int, what: str, steps: int) -> None:
    """Record in a run's folder that a process's GPU failed to decode, and after how many steps."""
    with open(out / DECODING_FAILURES.format(rank), "a", encoding="utf-8") as file:
        file.write(json.dumps({"steps_before": steps, "what": what}) + "\n")


def previous_placement(environments: Path) -> tuple[Decoding | None, str | None]:
    """Decoding and warp of the previous part of a run, from its `environment.jsonl`; None: not recorded."""
    try:
        *_, last = environments.read_text(encoding="utf-8").splitlines()
        about = json.loads(last)
        return Decoding(**about["decoding"]["decoding"]), about.get("warp")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None
