"""One training step: from a batch of views to new weights."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from fast_spatial import distributed
from fast_spatial.attack import losses_of, take_views, worst_view
from fast_spatial.model import Classifier, compile_network
from fast_spatial.scoring import Passes, Scorer
from pipelines.loader import Batch


class StepResult(NamedTuple):
    """Of one process's images [B]: the loss trained on, whether that view was correct, which view it was."""

    loss: Tensor
    correct: Tensor
    choice: Tensor


class TrainStep:
    """One step: judge the views, train on the worst, keep every process's BatchNorm and the scorer's weights in line.

    Args:
        model: the classifier, on its device.
        optimizer: over its parameters.
        dtype: float32 or a half precision for autocast; float16 brings a gradient scaler.
        scored: whether batches have several views to choose from.
        accumulate: parts of a batch trained on one after the other, as one step.
        score_chunk: views in one judging pass; 0 for all.
        score_side: judge the views at this smaller side, and train at the full one; 0: judge them as they are.
        compiled: let torch.compile fuse the network and the scorer's.

    """

    def __init__(
        self,
        model: Classifier,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: torch.dtype,
        scored: bool,
        accumulate: int = 1,
        score_chunk: int = 0,
        score_side: int = 0,
        compiled: bool = False,
    ) -> None:
        self.model, self.optimizer, self.dtype = model, optimizer, dtype
        self._accumulate = accumulate
        self._device = model.scale.device
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=dtype == torch.float16)
        self.scorer = Scorer(model, dtype, compiled=compiled) if scored else None
        self._passes = Passes(self.scorer, score_chunk, pad=compiled, side=score_side) if self.scorer else None
        if compiled:
            compile_network(model.net)
        self._parallel: nn.Module = model
        if torch.distributed.is_initialized():
            devices = [self._device.index] if self._device.type == "cuda" else None
            # Buffers are averaged after each step, not taken from rank 0 before the next; the option was renamed.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            keep_buffers: dict[str, Any] = {name: False}
            self._parallel = DistributedDataParallel(
                model, device_ids=devices, gradient_as_bucket_view=True, **keep_buffers
            )

    def __call__(self, batch: Batch) -> StepResult:
        self.model.train()
        with record_function("score"):
            choice = self._choose(batch)
            views = take_views(batch.views, choice)
        self.optimizer.zero_grad(set_to_none=True)
        losses, corrects = [], []
        parts = list(zip(views.tensor_split(self._accumulate), batch.labels.tensor_split(self._accumulate)))
        for number, (part, labels) in enumerate(parts):
            with self._sync(last=number == len(parts) - 1):
                with record_function("forward"), self._autocast():
                    logits = self._parallel(part)
                    loss = cross_entropy(logits, labels, reduction="none")
                with record_function("backward"):
                    self.scaler.scale(loss.sum() / len(views)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            corrects.append(logits.detach().argmax(dim=1) == labels)
        with record_function("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            distributed.average_buffers(self.model.net)
            if self.scorer is not None:
                self.scorer.refresh()
        return StepResult(torch.cat(losses), torch.cat(corrects), choice)

    def _choose(self, batch: Batch) -> Tensor:
        if self._passes is None:
            return torch.zeros_like(batch.labels)
        return worst_view(losses_of(self._passes(batch.views), batch.labels))

    def _autocast(self) -> Any:
        return torch.autocast(self._device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _sync(self, *, last: bool) -> Any:
        if last or not isinstance(self._parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._parallel.no_sync()
