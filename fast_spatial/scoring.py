"""Judging views fast: an inference twin of the model with BatchNorm folded into its convolutions.

The twin is a module of its own, so judging never touches the model's mode, gradients or running statistics. Folding
happens in float32, from the model's weights, and is cast once into the twin's dtype, in place, after every step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fast_spatial.model import Classifier, to_unit

log = logging.getLogger(__name__)

# Views uint8 [N, S, S, 3] to logits float32 [N, K].
Judge = Callable[[Tensor], Tensor]


class Scorer:
    """Logits float32 [N, K] of views uint8 [N, S, S, 3] under a model's weights as of the last `refresh`.

    Where folding does not apply (no BatchNorm after a convolution, or a network that cannot be traced), the model in
    evaluation mode serves, under autocast for half precision, and a log line says so.
    """

    def __init__(self, model: Classifier, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        self._pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]] = []
        self._plain: list[tuple[Tensor, Tensor]] = []
        self._twin = self._fold()
        self._fallback: nn.Module | None = None
        if self._twin is None:
            log.info("scoring: no BatchNorm to fold; the model itself judges, in evaluation mode")
            self._fallback = copy.deepcopy(model.net).requires_grad_(False).eval()
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights and running statistics."""
        for conv, norm, folded in self._pairs:
            assert norm.running_mean is not None and norm.running_var is not None and folded.bias is not None
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            folded.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
            bias = norm.bias - norm.running_mean * scale
            folded.bias.copy_(bias if conv.bias is None else bias + conv.bias * scale)
        if self._plain:
            torch._foreach_copy_([to for to, _ in self._plain], [of for _, of in self._plain])

    @torch.no_grad()
    def __call__(self, views: Tensor) -> Tensor:
        inputs = self._model.normalize(to_unit(views))
        if self._twin is not None:
            logits: Tensor = self._twin(inputs.to(self._dtype))
            return logits.float()
        assert self._fallback is not None
        state = {**dict(self._model.net.named_parameters()), **dict(self._model.net.named_buffers())}
        with torch.autocast(inputs.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return functional_call(self._fallback, state, (inputs,)).float()  # type: ignore[no-any-return]

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
            if id(tensor) not in folded_tensors:
                self._plain.append((tensor, source[name]))
        return twin


def module_judge(model: nn.Module, dtype: torch.dtype) -> Judge:
    """Judge with any module that takes images, float [N, 3, S, S] in [0, 1], as it is, in evaluation mode."""
    twin = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def judge(views: Tensor) -> Tensor:
        images = to_unit(views)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            logits: Tensor = twin(images)
        return logits.float()

    return judge
