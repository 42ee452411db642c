"""Processes: who this one is, what they share, and what happens when one stops moving."""

from __future__ import annotations

import datetime
import faulthandler
import gc
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fast_spatial.pipelines.inspection.probe import Choice


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank: the GLOBAL rank.
        local_rank: the rank on its node.
        world_size: the number of processes.
        device: where it computes.
        decoding: how all processes decode where nothing else is asked for, and why; None: nobody looked.
        exact_decoding: the same where pixels may not depend on load and chance: without the GPU's JPEG engine.
        probe_sec: that this process looked, or waited for another one that did.

    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    decoding: Choice | None = None
    exact_decoding: Choice | None = None
    probe_sec: float = 0.0


def start(stall_minutes: float) -> World:
    """Join the processes that torchrun started (or be the only one).

    The collectives' own time-out is longer than the watchdog's, so that stacks are printed before all is torn down.
    """
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1:
        timeout = datetime.timedelta(minutes=4 * stall_minutes + 1)
        if device.type == "cuda":
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return World(rank, local_rank, world_size, device)


def stop() -> None:
    """Leave the group and stand the watchdog down; nobody may hold on to a DDP module any more."""
    faulthandler.cancel_dump_traceback_later()
    if dist.is_initialized():
        # A DDP module that is the last to go waits for gloo's threads, and holds the interpreter, which one of them may
        # be waiting for: so torch 2.11 hung now and then.
        gc.collect()
        dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether there are other processes."""
    return dist.is_initialized()


def reset_watchdog(minutes: float) -> None:
    """Say that this process moves; if it does not say so again in time, it prints all its stacks and exits.

    Processes that wait for one that hangs stop moving too, so every rank shows where it was.
    """
    faulthandler.dump_traceback_later(minutes * 60, exit=True, file=sys.stderr)


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_min(value: Tensor) -> Tensor:
    """The smallest of all processes' values of a tensor, element by element, in place."""
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return value


def broadcast(value: int, device: torch.device) -> int:
    """The first process's number."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, src=0)
    return int(shared)


def all_equal(value: int, device: torch.device) -> bool:
    """Whether all processes hold the same number."""
    if not dist.is_initialized():
        return True
    extremes = torch.tensor([value, -value], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return int(extremes[0]) == -int(extremes[1])


class Ballot:
    """What any process wishes for, known to all of them at the same step, without waiting for anybody.

    Every process casts its wishes once a step, and is told what was wished for at the step before.

    Args:
        wishes: how many things may be wished for.

    """

    def __init__(self, wishes: int) -> None:
        self._nothing = [0] * wishes
        # A group of its own, so that its order among gradients does not matter; on CPUs, so that no device is read.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._counting: tuple[Tensor, Any] | None = None

    def __call__(self, *wishes: int) -> list[int]:
        """Cast wishes (0: none); returns the largest one of all processes for each, of the call before."""
        cast = torch.tensor(wishes, dtype=torch.int64)
        if self._group is None:
            return list(wishes)
        counted = self.outstanding()
        self._counting = cast, dist.all_reduce(cast, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return counted

    def outstanding(self) -> list[int]:
        """What was wished for at the last call, if nobody was told yet, or zeros; all processes have to ask."""
        if self._counting is None:
            return self._nothing
        (values, work), self._counting = self._counting, None
        work.wait()
        return [int(value) for value in values]


def gather(value: Any) -> list[Any]:
    """Every process's object, in the order of ranks, on rank 0; an empty list elsewhere."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, gathered if dist.get_rank() == 0 else None)
    return gathered


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def average_buffers(model: nn.Module) -> None:
    """Average BatchNorm's running statistics over all processes, in one flat all-reduce."""
    if not dist.is_initialized():
        return
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([b.reshape(-1) for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    torch._foreach_copy_(
        buffers, [part.view_as(b) for part, b in zip(torch.split(flat, [b.numel() for b in buffers]), buffers)]
    )
