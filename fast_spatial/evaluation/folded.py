"""Judging fast: an inference twin of the model, BatchNorm folded into its convolutions."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fast_spatial.evaluation.forward import Judge, log
from fast_spatial.evaluation.fused import fuse_relu, has_hooks, is_fusable, kernel_of_blocks, lighten_pools, unroll_stem
from fast_spatial.kernels.warp import warp_normalized
from fast_spatial.models.classifier import Classifier, compile_network


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
