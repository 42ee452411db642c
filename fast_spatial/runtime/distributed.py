"""Process group: rank and device, collectives, and a watchdog."""

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
    """This process and its group.

    Attributes:
        rank: the GLOBAL rank.
        local_rank: the rank on its node.
        world_size: the number of processes.
        device: the device that it computes on.
        decoding: the decoding of all processes unless an option sets it, and the reason; None: not probed.
        exact_decoding: the same where pixels must not depend on load or chance: without the GPU's JPEG engine.
        probe_sec: seconds of probing, or of waiting for another process that probes.

    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    decoding: Choice | None = None
    exact_decoding: Choice | None = None
    probe_sec: float = 0.0


def start(stall_minutes: float) -> World:
    """Join torchrun's process group; without torchrun, this process is alone.

    The collectives' timeout is longer than the watchdog's, so stacks are printed before the group is torn down.
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
    """Leave the group and cancel the watchdog. No reference to a DDP module may remain."""
    faulthandler.cancel_dump_traceback_later()
    if dist.is_initialized():
        # If a DDP module drops the last reference to the group, it waits for gloo's threads while it holds the GIL, and
        # one of them may wait for the GIL: torch 2.11 deadlocked occasionally.
        gc.collect()
        dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether this process belongs to a group."""
    return dist.is_initialized()


def reset_watchdog(minutes: float) -> None:
    """Reset the watchdog: unless called again within `minutes`, dump all stacks and exit.

    Processes that wait for a hanging one time out as well, so every rank shows its position.
    """
    faulthandler.dump_traceback_later(minutes * 60, exit=True, file=sys.stderr)


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_min(value: Tensor) -> Tensor:
    """The element-wise minimum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return value


def broadcast(value: int, device: torch.device) -> int:
    """The number of rank 0, on all processes."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, src=0)
    return int(shared)


def all_equal(value: int, device: torch.device) -> bool:
    """Whether all processes have the same number."""
    if not dist.is_initialized():
        return True
    extremes = torch.tensor([value, -value], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    return int(extremes[0]) == -int(extremes[1])


class StepAgreement:
    """A non-blocking all-reduce (maximum) of a few integers per step, so that all processes decide alike.

    Every process submits its values once per step, and gets the maxima of the previous step.

    Args:
        wishes: number of values.

    """

    def __init__(self, wishes: int) -> None:
        self._nothing = [0] * wishes
        # A separate group, so that its order relative to gradients does not matter; on the CPU, to avoid device syncs.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._counting: tuple[Tensor, Any] | None = None

    def __call__(self, *wishes: int) -> list[int]:
        """Submit values (0: none); returns the maxima of the previous call. A process alone gets its own at once."""
        cast = torch.tensor(wishes, dtype=torch.int64)
        if self._group is None:
            return list(wishes)
        counted = self.outstanding()
        self._counting = cast, dist.all_reduce(cast, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return counted

    def outstanding(self) -> list[int]:
        """The maxima of the last call if not yet returned, else zeros; a collective call."""
        if self._counting is None:
            return self._nothing
        (values, work), self._counting = self._counting, None
        work.wait()
        return [int(value) for value in values]


def gather(value: Any) -> list[Any]:
    """The objects of all processes in rank order, on rank 0; an empty list on other ranks."""
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
