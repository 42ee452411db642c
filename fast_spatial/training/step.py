"""One training step: from a batch of views to updated weights."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from fast_spatial.config.train import TrainConfig
from fast_spatial.evaluation.attack import losses_of, take_views, worst_view
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward, default_pass_size
from fast_spatial.kernels.crops import Crops
from fast_spatial.models import classifier, surgery
from fast_spatial.models.classifier import Classifier, compile_network
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime import distributed
from fast_spatial.training.optim import make_optimizer


class StepResult(NamedTuple):
    """Per image of this process, [B]: cross-entropy of the trained view, whether it was correct, and its index."""

    loss: Tensor
    correct: Tensor
    choice: Tensor


def make_step(config: TrainConfig, num_classes: int, device: torch.device, dtype: torch.dtype) -> TrainStep:
    """A `TrainStep` on a freshly initialized network."""
    net = classifier.build(config.arch, num_classes)
    if config.bn_group_size:
        surgery.group_batch_norm(net, config.bn_group_size)
    if config.blurpool:
        surgery.blur_before_strides(net)
    if device.type == "cpu" and dtype == torch.bfloat16:
        surgery.widen_before_strides(net)
    model = Classifier(net).to(device)
    return TrainStep(
        model,
        make_optimizer(config, model),
        dtype=dtype,
        scored=config.num_views > 1,
        grad_accum_steps=config.grad_accum_steps,
        views_per_forward=config.views_per_forward,
        score_size=config.score_size,
        label_smoothing=config.label_smoothing,
        compiled=config.is_compiled(on_gpu=device.type == "cuda"),
    )


class TrainStep:
    """One step: score the views, train on the worst, average BatchNorm's buffers over processes, refresh the scorer.

    Args:
        model: the classifier, on its device.
        optimizer: the optimizer of its parameters.
        dtype: float32, or a half precision for autocast; float16 adds a gradient scaler.
        scored: whether batches have several views per image to choose from.
        grad_accum_steps: number of micro-batches per step.
        views_per_forward: views per scoring forward pass; 0: `default_pass_size` at the image size.
        score_size: image size for scoring; training uses the full size; 0: score at the full size.
        label_smoothing: share of the training target spread over all classes. It changes only the gradient: plain
            cross-entropy selects the views and is the returned loss.
        compiled: compile the network with torch.compile, and the scorer as in `FoldedJudge`.

    """

    def __init__(
        self,
        model: Classifier,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: torch.dtype,
        scored: bool,
        grad_accum_steps: int = 1,
        views_per_forward: int = 0,
        score_size: int = 0,
        label_smoothing: float = 0.0,
        compiled: bool = False,
    ) -> None:
        self.model, self.optimizer, self.dtype = model, optimizer, dtype
        self._grad_accum_steps, self._label_smoothing = grad_accum_steps, label_smoothing
        self._device = model.scale.device
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=dtype == torch.float16)
        self.scorer = FoldedJudge(model, dtype, compiled=compiled) if scored else None
        self._views_per_forward, self._score_size = views_per_forward, score_size
        self._passes: dict[int, BatchedForward] = {}  # by image size, which may grow during training
        if compiled:
            compile_network(model.net)
        self._parallel: nn.Module = model
        if torch.distributed.is_initialized():
            devices = [self._device.index] if self._device.type == "cuda" else None
            # `average_buffers` averages BatchNorm's buffers, so DDP must not broadcast them. torch renamed this option.
            known = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            keep_buffers: dict[str, Any] = {name: False}
            self._parallel = DistributedDataParallel(
                model, device_ids=devices, gradient_as_bucket_view=True, **keep_buffers
            )

    def __call__(self, batch: Batch) -> StepResult:
        self.model.train()
        with record_function("score"):
            views, choice = self._choose(batch)
        normalized = views.dtype != torch.uint8
        self.optimizer.zero_grad(set_to_none=True)
        losses, corrects = [], []
        parts = list(zip(views.tensor_split(self._grad_accum_steps), batch.labels.tensor_split(self._grad_accum_steps)))
        for number, (part, labels) in enumerate(parts):
            with self._sync(last=number == len(parts) - 1):
                with record_function("forward"), self._autocast():
                    logits = self._parallel(part, normalized=normalized)
                    loss = plain = cross_entropy(logits, labels, reduction="none")
                    if self._label_smoothing:
                        loss = cross_entropy(logits, labels, reduction="none", label_smoothing=self._label_smoothing)
                with record_function("backward"):
                    self.scaler.scale(loss.sum() / len(views)).backward()  # type: ignore[no-untyped-call]
            losses.append(plain.detach())
            corrects.append(logits.detach().argmax(dim=1) == labels)
        with record_function("optimizer"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            distributed.average_buffers(self.model.net)
            if self.scorer is not None:
                self.scorer.refresh()
        return StepResult(torch.cat(losses), torch.cat(corrects), choice)

    def _choose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The view of each image to train on, uint8 [B, S, S, 3] or normalized [B, 3, S, S], and its index, [B].

        Views of crops are warped and normalized once; scoring and training share them.
        """
        if isinstance(batch.made, Crops) and not self._score_size:
            B, V = batch.made.matrices.shape[:2]
            views_NCSS = batch.made.normalized(self.model.scale, self.model.shift, self.dtype)
            choice = self._worst(batch, lambda passes: passes.prepared(views_NCSS, V))
            views_BVSSC = views_NCSS.permute(0, 2, 3, 1).view(B, V, batch.side, batch.side, 3)
            return take_views(views_BVSSC, choice).permute(0, 3, 1, 2), choice
        choice = self._worst(batch, lambda passes: passes(batch.views))
        return take_views(batch.views, choice), choice

    def _worst(self, batch: Batch, logits: Callable[[BatchedForward], Tensor]) -> Tensor:
        if self.scorer is None:
            return torch.zeros_like(batch.labels)
        side = batch.side
        if side not in self._passes:
            size = self._views_per_forward or default_pass_size(self._device, self._score_size or side)
            self._passes[side] = BatchedForward(self.scorer, size, pad=self.scorer.compiled, side=self._score_size)
        return worst_view(losses_of(logits(self._passes[side]), batch.labels))

    def _autocast(self) -> Any:
        return torch.autocast(self._device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _sync(self, *, last: bool) -> Any:
        if last or not isinstance(self._parallel, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._parallel.no_sync()
