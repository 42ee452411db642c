"""What a checkpoint holds of a training: its position, and everything that a step changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fast_spatial.config.train import TrainConfig
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.models import checkpoint
from fast_spatial.models.ema import WeightEma
from fast_spatial.pipelines.loader import Batch
from fast_spatial.training.optim import set_lr
from fast_spatial.training.step import StepResult, make_step


@dataclass(frozen=True)
class Position:
    """A place between two steps of a training.

    The end of an epoch is (epoch, all its steps) before its evaluation, and (epoch + 1, 0) after it.

    Attributes:
        steps_per_epoch: optimizer steps of a whole epoch.
        epoch: the epoch, from 0.
        step: steps done in this epoch.
        steps_done: steps done since the start of the training.

    """

    steps_per_epoch: int
    epoch: int = 0
    step: int = 0
    steps_done: int = 0

    @classmethod
    def saved(cls, saved: dict[str, Any], steps_per_epoch: int) -> Position:
        """The position of a checkpoint."""
        epoch, step = saved["epoch"], saved["step"]
        steps_done = saved.get("steps", epoch * steps_per_epoch + step)  # missing in runs of earlier versions
        return cls(steps_per_epoch, epoch, step, steps_done)

    @property
    def epochs_done(self) -> float:
        """Epochs done; whole after the last step of an epoch."""
        if self.step == self.steps_per_epoch:
            return self.epoch + 1
        return round(self.steps_done / self.steps_per_epoch, 3)

    def steps_in_epoch(self, end: int) -> int:
        """Steps of this epoch in a training of `end` steps; at most 0 if the training ends before this epoch."""
        return min(self.steps_per_epoch, end - self.epoch * self.steps_per_epoch)

    def next_step(self) -> Position:
        """The position after one more step."""
        return dataclasses.replace(self, step=self.step + 1, steps_done=self.steps_done + 1)

    def next_epoch(self) -> Position:
        """The start of the next epoch."""
        return dataclasses.replace(self, epoch=self.epoch + 1, step=0)


class TrainState:
    """The network with its optimizer, gradient scaler, average of the weights, and judge.

    Args:
        config: the options of the training.
        num_classes: number of classes.
        device: the device of this process.
        dtype: precision of the forward passes.

    Attributes:
        dtype: precision of the forward passes.
        judge: judges the evaluated weights: the average with `--ema`, otherwise the trained ones.

    """

    def __init__(self, config: TrainConfig, num_classes: int, device: torch.device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._step = make_step(config, num_classes, device, dtype)
        self._net = self._step.model.net
        self._average = WeightEma(self._step.model, config.ema) if config.ema else None
        if self._average is not None:
            compiled = config.is_compiled(on_gpu=device.type == "cuda")
            self.judge = FoldedJudge(self._average.model, dtype, compiled=compiled)
        else:
            self.judge = self._step.scorer or FoldedJudge(self._step.model, dtype)

    def step(self, batch: Batch, lr: float) -> StepResult:
        """One optimizer step on a batch, at a learning rate; the average follows."""
        set_lr(self._step.optimizer, lr)
        result = self._step(batch)
        if self._average is not None:
            self._average.update()
        return result

    def weights(self) -> Iterator[Tensor]:
        """The trained parameters, and the running statistics."""
        yield from self._net.parameters()
        yield from (buffer for buffer in self._net.buffers() if buffer.is_floating_point())

    def state_dict(self) -> dict[str, Any]:
        """References to the current state. `model` are the evaluated weights; `trained` are the others with `--ema`."""
        return {
            "model": self._net.state_dict() if self._average is None else self._average.state_dict(),
            "trained": None if self._average is None else self._net.state_dict(),
            "optimizer": self._step.optimizer.state_dict(),
            "scaler": self._step.scaler.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        if self._average is None:
            checkpoint.set_weights(self._net, saved["model"])
        else:
            checkpoint.set_weights(self._average.model.net, saved["model"])
            checkpoint.set_weights(self._net, saved["trained"])
        self._step.optimizer.load_state_dict(saved["optimizer"])
        self._step.scaler.load_state_dict(saved["scaler"])
        if self._step.scorer is not None:
            self._step.scorer.refresh()
