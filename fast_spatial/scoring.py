"""Judging views fast: what a judge is, and an inference twin of the model with BatchNorm folded into its convolutions.

The twin is a module of its own, so judging never touches the model's mode, gradients or running statistics. Folding
happens in float32, from the model's weights, and is cast once into the twin's dtype, in place, after every step.

N views, B images, V views of each, S side, K classes.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.functional import interpolate, pad

from fast_spatial.device import largest_pass
from fast_spatial.fused import fuse_relu, has_hooks, is_fusable, kernel_of_blocks, lighten_pools, unroll_stem
from fast_spatial.model import Classifier, compile_network, to_unit
from kernels.warp import warp, warp_normalized

log = logging.getLogger(__name__)
# How torch says that cuDNN cannot compute a convolution of this size.
_NO_ENGINE = ("unable to find an engine", "unable to find a valid cudnn algorithm", "cudnn_status_not_supported")


class Judge(ABC):
    """Logits of views, in two parts: what the network takes, and the network."""

    @abstractmethod
    def inputs(self, views_NSSC: Tensor) -> Tensor:
        """What the network takes, [N, ...], of views, uint8 [N, S, S, 3]."""

    @abstractmethod
    def logits(self, inputs: Tensor) -> Tensor:
        """Logits, float32 [N, K], of what the network takes."""

    def warped(self, images_BSSC: Tensor, matrices_BV23: Tensor) -> Tensor:
        """What the network takes, [B * V, ...], of warps of images, uint8 [B, S, S, 3]."""
        return self.inputs(warp(images_BSSC, matrices_BV23).flatten(0, 1))

    def __call__(self, views_NSSC: Tensor) -> Tensor:
        return self.logits(self.inputs(views_NSSC))


class Passes:
    """A judge's forward passes over any number of views; halved when memory runs out, and smaller from then on.

    Args:
        judge: what is asked.
        size: views in one pass; 0: all, in the fewest even passes that `device.largest_pass` allows.
        pad: fill the last pass up to `size`, so that all have one shape and a verdict cannot depend on how many views
            were left over.
        side: shrink the views to this side; 0: judge them as they are.

    """

    def __init__(self, judge: Judge, size: int, *, pad: bool = False, side: int = 0) -> None:
        self.judge, self.size, self._pad, self._side = judge, size, pad, side

    def __call__(self, views_BVSSC: Tensor) -> Tensor:
        """Logits float32 [B, V, K] of uint8 views."""
        B, V = views_BVSSC.shape[:2]
        views_NSSC = views_BVSSC.flatten(0, 1)
        side = self._side or views_BVSSC.shape[2]
        return self._run(B * V, side, lambda part: self.judge.inputs(self._shrink(views_NSSC[part]))).view(B, V, -1)

    def prepared(self, inputs_N: Tensor, views: int) -> Tensor:
        """Logits float32 [B, V, K] of what the judge's network takes, [B * V, 3, S, S], views of an image together."""
        logits_NK = self._run(len(inputs_N), inputs_N.shape[2], lambda part: inputs_N[part])
        return logits_NK.view(len(inputs_N) // views, views, -1)

    def warped(self, images_BSSC: Tensor, matrices_BV23: Tensor) -> Tensor:
        """Logits float32 [B, V, K] of warps of uint8 images."""
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
            log.warning("%s in a forward pass over %d views: %d from here on", why, failed, self.size)
            torch.cuda.empty_cache()

    def _one(self, inputs: Tensor, size: int) -> Tensor:
        missing = size - len(inputs) if self._pad else 0
        if missing:  # `pad` keeps the layout in memory, which decides how a convolution is computed
            inputs = pad(inputs, (0, 0) * (inputs.ndim - 1) + (0, missing))
        return self.judge.logits(inputs)[: len(inputs) - missing]

    def _shrink(self, views_NSSC: Tensor) -> Tensor:
        if not self._side:
            return views_NSSC
        images = views_NSSC.permute(0, 3, 1, 2)
        if images.device.type != "cpu":  # bytes are taken on CPUs only
            images = images.to(torch.float32)
        small = interpolate(images, size=(self._side, self._side), mode="bilinear", antialias=True)
        return (small if small.dtype == torch.uint8 else small.round_().to(torch.uint8)).permute(0, 2, 3, 1)


def even_pass(count: int, largest: int) -> int:
    """Views in each of the fewest passes over `count` views that are about equal and none above `largest`."""
    passes = -(-count // largest)
    return -(-count // passes)


def _too_large(error: RuntimeError) -> str | None:
    """In words, what a smaller pass may cure; None for other errors."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return "no convolution engine" if any(sign in str(error).lower() for sign in _NO_ENGINE) else None


class Scorer(Judge):
    """A model's judge, under its weights as of the last `refresh`.

    Where folding does not apply (no BatchNorm after a convolution, or a network that cannot be traced), the model in
    evaluation mode serves, under autocast for half precision, and a log line says so.

    Args:
        model: what is judged with.
        dtype: arithmetic of the network.
        compiled: let torch.compile fuse the twin, for passes of one shape; not in half precision on GPUs, where cuDNN
            does it, and nothing has to be compiled.

    Attributes:
        compiled: whether torch.compile fuses it.

    """

    def __init__(self, model: Classifier, dtype: torch.dtype, *, compiled: bool = False) -> None:
        self._model, self._dtype = model, dtype
        self._pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]] = []
        self._plain: list[tuple[Tensor, Tensor]] = []
        self._twin = self._fold()
        self._fallback: nn.Module | None = None
        self.compiled = False
        if self._twin is None:
            log.info("scoring: no BatchNorm to fold; the model itself judges, in evaluation mode")
            self._fallback = copy.deepcopy(model.net).requires_grad_(False).eval()
        else:
            self._speed_up(self._twin, compiled=compiled)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights and running statistics."""
        if self._pairs:
            convs, norms, folded = zip(*self._pairs)
            # Few launches for all layers: for each alone, ResNet-18 would need four times as many in every step.
            deviations = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
            scales = torch._foreach_mul([norm.weight for norm in norms], torch._foreach_rsqrt(deviations))
            shifts = torch._foreach_mul([norm.running_mean for norm in norms], scales)
            biases = [
                bias if conv.bias is None else bias + conv.bias * scale
                for bias, conv, scale in zip(torch._foreach_sub([norm.bias for norm in norms], shifts), convs, scales)
            ]
            weights = [conv.weight * scale.view(-1, 1, 1, 1) for conv, scale in zip(convs, scales)]
            weights = [
                weight if weight.shape == conv.weight.shape else kernel_of_blocks(weight)
                for weight, conv in zip(weights, folded)
            ]
            torch._foreach_copy_([conv.weight for conv in folded], weights)
            torch._foreach_copy_([conv.bias for conv in folded], biases)
        if self._plain:
            torch._foreach_copy_([to for to, _ in self._plain], [of for _, of in self._plain])

    @torch.no_grad()
    def inputs(self, views_NSSC: Tensor) -> Tensor:
        return self._model.normalize(views_NSSC, self._dtype)

    @torch.no_grad()
    def warped(self, images_BSSC: Tensor, matrices_BV23: Tensor) -> Tensor:
        return warp_normalized(images_BSSC, matrices_BV23, self._model.scale, self._model.shift, self._dtype)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        if self._twin is not None:
            logits: Tensor = self._twin(inputs)
            return logits.float()
        assert self._fallback is not None
        state = {**dict(self._model.net.named_parameters()), **dict(self._model.net.named_buffers())}
        with torch.autocast(inputs.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return functional_call(self._fallback, state, (inputs,)).float()  # type: ignore[no-any-return]

    def _speed_up(self, twin: fx.GraphModule, *, compiled: bool) -> None:
        device = self._model.scale.device
        if is_fusable(device, self._dtype):
            self._pairs = [(conv, norm, unroll_stem(twin, folded)) for conv, norm, folded in self._pairs]
            fuse_relu(twin)
            lighten_pools(twin)
        elif compiled:
            compile_network(twin)
            self.compiled = True
        elif device.type == "cuda":
            lighten_pools(twin)

    def _fold(self) -> fx.GraphModule | None:
        """The twin of the network, its BatchNorms gone, and the list of what `refresh` has to copy."""
        net = self._model.net
        plain = copy.deepcopy(net).requires_grad_(False).eval()
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = nn.BatchNorm2d  # a leaf to the tracer; groups matter in training alone
        try:
            twin = fx.symbolic_trace(plain)
        except (fx.proxy.TraceError, TypeError, RuntimeError):  # control flow that depends on data
            return None
        live, mine = dict(net.named_modules()), dict(twin.named_modules())
        calls = [node.target for node in twin.graph.nodes if node.op == "call_module"]
        for node in list(twin.graph.nodes):
            if node.op != "call_module" or type(mine.get(node.target)) is not nn.Conv2d or len(node.users) != 1:
                continue
            after = next(iter(node.users))
            norm = live.get(str(after.target)) if after.op == "call_module" else None
            if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.weight is None:
                continue
            if calls.count(node.target) > 1 or calls.count(after.target) > 1:
                continue
            conv, folded = live[node.target], mine[node.target]
            if has_hooks(norm) or conv._forward_hooks:  # what they read or change would not be there
                continue
            assert isinstance(conv, nn.Conv2d) and isinstance(folded, nn.Conv2d)
            folded.bias = nn.Parameter(torch.empty_like(norm.bias), requires_grad=False)
            self._pairs.append((conv, norm, folded))
            after.replace_all_uses_with(node)
            twin.graph.erase_node(after)
        if not self._pairs:
            return None
        twin.delete_all_unused_submodules()
        twin.recompile()
        twin.to(self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        folded_tensors = {id(t) for _, _, f in self._pairs for t in (f.weight, f.bias)}
        source = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
            if id(tensor) not in folded_tensors and name in source:  # tracing may add constants
                self._plain.append((tensor, source[name]))
        return twin


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
    """Judge with any module that takes images, float [N, 3, S, S] in [0, 1], as it is, in evaluation mode."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._twin, self._dtype = copy.deepcopy(model).requires_grad_(False).eval(), dtype

    def inputs(self, views_NSSC: Tensor) -> Tensor:
        return to_unit(views_NSSC)

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, self._dtype, enabled=self._dtype != torch.float32):
            logits: Tensor = self._twin(inputs)
        return logits.float()
