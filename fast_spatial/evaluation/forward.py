"""Forward passes over views: the interface of judges, and passes of a size that fits into memory.

N views, B images, V views of each, S image size, K classes.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from fast_spatial.kernels.warp import warp
from fast_spatial.models.classifier import to_unit


def default_pass_size(device: torch.device, side: int) -> int:
    """Default number of views per forward pass; 0: all, in passes of at most `largest_pass` views.

    A CPU is fastest while a layer's activations stay in its cache. Measured with ResNet-18 on 2 cores with 32 MiB: 2^20
    pixels were about best at image sizes 224, 112, 64 and 32, and four times as many were up to half slower.
    """
    return 0 if device.type == "cuda" else max(1, (1 << 20) // side**2)


def largest_pass(side: int) -> int:
    """The most views per forward pass whose largest activation has fewer than 2^31 elements: 2,674 at 224 px.

    A ResNet's largest activation has 64 channels at half the image size: 16 side^2 elements per view. Few cuDNN engines
    index beyond 2^31 elements: on an H200 in bfloat16, one pass over 2,816 views was 10 % slower than two over 1,408.
    """
    return max(1, ((1 << 31) - 1) // (16 * side**2))


log = logging.getLogger(__name__)
# Parts of torch's messages when cuDNN cannot compute a convolution of this size.
_NO_ENGINE = ("unable to find an engine", "unable to find a valid cudnn algorithm", "cudnn_status_not_supported")


class Judge(ABC):
    """Computes the logits of views in two steps: the network's inputs, and the network."""

    @abstractmethod
    def inputs(self, views_NSSC: Tensor) -> Tensor:
        """The network's inputs, [N, ...], from views, uint8 [N, S, S, 3]."""

    @abstractmethod
    def logits(self, inputs: Tensor) -> Tensor:
        """Logits, float32 [N, K], from the network's inputs."""

    def warped(self, images_BSSC: Tensor, matrices_BV23: Tensor) -> Tensor:
        """The network's inputs, [B * V, ...], from images, uint8 [B, S, S, 3], and warps, float32 [B, V, 2, 3]."""
        return self.inputs(warp(images_BSSC, matrices_BV23).flatten(0, 1))

    def __call__(self, views_NSSC: Tensor) -> Tensor:
        return self.logits(self.inputs(views_NSSC))


class BatchedForward:
    """A judge's forward passes over any number of views. When memory runs out, the pass size is halved for good.

    Args:
        judge: computes the logits.
        size: views per pass; 0: all, in the fewest even passes that `largest_pass` allows.
        pad: pad the last pass to `size`. All passes then have one shape, so that a verdict cannot depend on the number
            of views in the last pass.
        side: image size that the views are shrunk to; 0: unchanged.

    """

    def __init__(self, judge: Judge, size: int, *, pad: bool = False, side: int = 0) -> None:
        self.judge, self.size, self._pad, self._side = judge, size, pad, side

    def __call__(self, views_BVSSC: Tensor) -> Tensor:
        """Logits float32 [B, V, K] of uint8 views [B, V, S, S, 3]."""
        B, V = views_BVSSC.shape[:2]
        views_NSSC = views_BVSSC.flatten(0, 1)
        side = self._side or views_BVSSC.shape[2]
        return self._run(B * V, side, lambda part: self.judge.inputs(self._shrink(views_NSSC[part]))).view(B, V, -1)

    def prepared(self, inputs_N: Tensor, views: int) -> Tensor:
        """Logits float32 [B, V, K] of the network's inputs, [B * V, 3, S, S], with an image's views adjacent."""
        logits_NK = self._run(len(inputs_N), inputs_N.shape[2], lambda part: inputs_N[part])
        return logits_NK.view(len(inputs_N) // views, views, -1)

    def warped(self, images_BSSC: Tensor, matrices_BV23: Tensor) -> Tensor:
        """Logits float32 [B, V, K] of warps, float32 [B, V, 2, 3], of images, uint8 [B, S, S, 3]."""
        B, V = matrices_BV23.shape[:2]

        def inputs(part: slice) -> Tensor:
            if part.stop - part.start == B * V:
                return self.judge.warped(images_BSSC, matrices_BV23)
            image_N = torch.arange(part.start, part.stop, device=images_BSSC.device) // V
            return self.judge.warped(images_BSSC[image_N], matrices_BV23.flatten(0, 1)[part, None])

        return self._run(B * V, images_BSSC.shape[1], inputs).view(B, V, -1)

    def _run(self, count: int, side: int, inputs: Callable[[slice], Tensor]) -> Tensor:
        while True:
            size = self.size or even_pass(count, largest_pass(side))
            try:
                parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
                return torch.cat([self._one(inputs(part), size) for part in parts])
            except RuntimeError as error:
                why = _too_large(error)
                if why is None or size == 1:
                    raise
            # Outside the handler, or the exception would keep the failed pass in memory.
            failed = size if self._pad else min(size, count)
            self.size = (failed + 1) // 2
            log.warning("%s in a forward pass over %d views; continuing with %d views", why, failed, self.size)
            torch.cuda.empty_cache()

    def _one(self, inputs: Tensor, size: int) -> Tensor:
        missing = size - len(inputs) if self._pad else 0
        if missing:  # `pad` keeps the memory format, which selects the convolution's algorithm
            inputs = pad(inputs, (0, 0) * (inputs.ndim - 1) + (0, missing))
        return self.judge.logits(inputs)[: len(inputs) - missing]

    def _shrink(self, views_NSSC: Tensor) -> Tensor:
        if not self._side:
            return views_NSSC
        images = views_NSSC.permute(0, 3, 1, 2)
        if images.device.type != "cpu":  # torch shrinks uint8 only on CPUs
            images = images.to(torch.float32)
        small = interpolate(images, size=(self._side, self._side), mode="bilinear", antialias=True)
        return (small if small.dtype == torch.uint8 else small.round_().to(torch.uint8)).permute(0, 2, 3, 1)


def even_pass(count: int, largest: int) -> int:
    """Views per pass in the fewest even passes over `count` views, with at most `largest` in each."""
    passes = -(-count // largest)
    return -(-count // passes)


def _too_large(error: RuntimeError) -> str | None:
    """The description of an error that a smaller pass may avoid; None for other errors."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return "no convolution engine" if any(sign in str(error).lower() for sign in _NO_ENGINE) else None


class FlipJudge(Judge):
    """A judge's logits averaged over every view and its mirror image."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def inputs(self, views_NSSC: Tensor) -> Tensor:
        return self._judge.inputs(views_NSSC)

    def warped(self, images_BSSC: Tensor, matrices_BV23: Tensor) -> Tensor:
        return self._judge.warped(images_BSSC, matrices_BV23)

    def logits(self, inputs: Tensor) -> Tensor:
        return (self._judge.logits(inputs) + self._judge.logits(inputs.flip(3))) / 2


class ModuleJudge(Judge):
    """The judge of any module that takes images, float [N, 3, S, S] in [0, 1]: a copy, in evaluation mode."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._twin, self._dtype = copy.deepcopy(model).requires_grad_(False).eval(), dtype

    def inputs(self, views_NSSC: Tensor) -> Tensor:
        return to_unit(views_NSSC)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits: Tensor = self._twin(inputs)
        return logits.float()


def default_judge_batch(device: torch.device, side: int) -> int:
    """Default number of views per forward pass, where all passes have one shape."""
    return default_pass_size(device, side) or min(1024, largest_pass(side))


def one_shape(judge: Judge, size: int, *, device: torch.device, side: int) -> BatchedForward:
    """Forward passes that all have one shape, of `size` views; 0: `default_judge_batch`."""
    return BatchedForward(judge, size or default_judge_batch(device, side), pad=True)
