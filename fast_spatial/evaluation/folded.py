"""Fast judging: an inference twin of the model, with BatchNorm folded into its convolutions.

The twin is a separate module, so judging never touches the model's mode, gradients or running statistics. Weights are
folded in float32 and cast once into the twin's dtype, in place, at every `refresh`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from fast_spatial.evaluation.forward import Judge, log
from fast_spatial.evaluation.fused import fuse_relu, has_hooks, is_fusable, kernel_of_blocks, lighten_pools, unroll_stem
from fast_spatial.kernels.warp import warp_normalized
from fast_spatial.models.classifier import Classifier, compile_network


class FoldedJudge(Judge):
    """A model's judge, with the model's weights as of the last `refresh`.

    If folding does not apply (no BatchNorm after a convolution, or a network that cannot be traced), a copy of the
    model in evaluation mode is used, under autocast in half precision. A log line reports this.

    Args:
        model: the model.
        dtype: precision of the forward passes.
        compiled: compile the twin with torch.compile, for passes of one shape. In half precision on GPUs the twin uses
            fused cuDNN kernels instead.

    Attributes:
        compiled: whether the twin is compiled.

    """

    def __init__(self, model: Classifier, dtype: torch.dtype, *, compiled: bool = False) -> None:
        self._model, self._dtype = model, dtype
        self._pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]] = []
        self._plain: list[tuple[Tensor, Tensor]] = []
        self._twin = self._fold()
        self._fallback: nn.Module | None = None
        self.compiled = False
        if self._twin is None:
            log.info("scoring: no BatchNorm to fold; using the model in evaluation mode")
            self._fallback = copy.deepcopy(model.net).requires_grad_(False).eval()
        else:
            self._speed_up(self._twin, compiled=compiled)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's current weights and running statistics."""
        if self._pairs:
            convs, norms, folded = zip(*self._pairs)
            # Foreach operators need few kernel launches. Layer by layer, ResNet-18 would need four times as many.
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
        """The twin without BatchNorms (None if folding does not apply); lists the tensors that `refresh` copies."""
        net = self._model.net
        plain = copy.deepcopy(net).requires_grad_(False).eval()
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = nn.BatchNorm2d  # a leaf for the tracer; groups matter only in training
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
            if has_hooks(norm) or conv._forward_hooks:  # folding removes the tensors that hooks read or change
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
