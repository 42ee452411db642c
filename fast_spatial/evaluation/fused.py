"""A traced network, rewritten to run faster on a GPU with the same result.

- Convolution, addition and ReLU become one cuDNN kernel instead of three or four.
- The stem, a stride-two convolution over 3 channels, becomes a stride-one convolution over 16 channels (12, and zeros),
  since tensor cores multiply eight channels at a time.
- Max pooling computes no indices.

A layer with a hook stays unchanged, since the rewritten network would not call the hook.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.utils import _pair

_EIGHT = 8  # channels that tensor cores read together
_FEW = 4  # most input channels of a stem
_RELUS = (torch.relu, functional.relu)
_SUMS = (operator.add, operator.iadd, torch.add)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module also runs hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module) is kind and not has_hooks(module)


def is_fusable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN has these kernels and they pay off: in half precision, where memory writes take most of the time.

    Some of them sum in any order, and torch does not exclude these under deterministic algorithms.
    """
    repeatable = torch.are_deterministic_algorithms_enabled()
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and not repeatable


class Zeros:
    """Zeros to add where there is no shortcut: one buffer for all convolutions of a network.

    `torch.cudnn_convolution_relu` adds 0 times its own uninitialized output instead, and 0 times NaN is NaN.
    """

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def like(self, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Zeros [N, C, H, W], channels_last, of the dtype and on the device of a tensor."""
        N, C, H, W = shape
        count = N * C * H * W
        if self._kept is None or len(self._kept) < count or self._kept.dtype != x.dtype:
            self._kept = torch.zeros(count, dtype=x.dtype, device=x.device)
        return self._kept[:count].view(N, H, W, C).permute(0, 3, 1, 2)


class ConvReLU(nn.Module):
    """ReLU of a convolution, or of its sum with a shortcut."""

    def __init__(self, conv: nn.Conv2d, zeros: Zeros) -> None:
        super().__init__()
        self.conv, self._zeros = conv, zeros

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """[N, C, H, W] to the convolution's output shape, which is also the shape of `shortcut`."""
        conv = self.conv
        stride, padding, dilation = conv.stride, conv.padding, conv.dilation
        assert not isinstance(padding, str)
        if x.device.type != "cuda":
            out: Tensor = conv(x)
            return (out if shortcut is None else out.add_(shortcut)).relu_()
        share = 1.0
        if shortcut is None:
            height, width = (
                (x.shape[2 + k] + 2 * padding[k] - dilation[k] * (conv.kernel_size[k] - 1) - 1) // stride[k] + 1
                for k in range(2)
            )
            shortcut, share = self._zeros.like(x, (len(x), conv.out_channels, height, width)), 0.0
        return torch.cudnn_convolution_add_relu(
            x, conv.weight, shortcut, share, conv.bias, stride, padding, dilation, conv.groups
        )


def fuse_relu(network: fx.GraphModule) -> int:
    """Fuse the convolutions of a network with a following ReLU, or with a sum and a ReLU, in place.

    The convolution modules and their weights stay the same. Returns the number of fused convolutions.
    """
    modules = dict(network.named_modules())
    called = [node.target for node in network.graph.nodes if node.op == "call_module"]
    zeros = Zeros()

    def is_convolution(node: object) -> bool:
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
            return False
        conv = modules[str(node.target)]
        plain = _is(conv, nn.Conv2d) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        # Grouped convolutions have other kernels; depthwise ones are torch's own.
        return plain and conv.groups == 1 and called.count(node.target) == 1

    def does(node: object, functions: tuple[object, ...], methods: tuple[str, ...], kind: type | None = None) -> bool:
        if not isinstance(node, fx.Node):
            return False
        if node.op == "call_module":
            return kind is not None and _is(modules[str(node.target)], kind)
        return node.target in {"call_function": functions, "call_method": methods}.get(node.op, ())

    def changes(node: fx.Node, value: object) -> bool:
        """Whether a node may change a value in place."""
        if not node.args or node.args[0] is not value:
            return False
        if node.op == "call_module":
            return bool(getattr(modules[str(node.target)], "inplace", False))
        in_place = node.target is operator.iadd or bool(node.kwargs.get("inplace"))
        return in_place or (node.op == "call_method" and str(node.target).endswith("_"))

    found = 0
    for relu in list(network.graph.nodes):
        if not does(relu, _RELUS, ("relu", "relu_"), nn.ReLU):
            continue
        before = relu.args[0]
        conv, others = before, []
        if does(before, _SUMS, ("add", "add_")) and len(before.users) == 1 and not before.kwargs:
            # A shortcut has the convolution's shape. A weight (get_attr) might be broadcast.
            conv = next(filter(is_convolution, before.args), None)
            others = [arg for arg in before.args if arg is not conv]
        if not is_convolution(conv) or not all(isinstance(arg, fx.Node) and arg.op != "get_attr" for arg in others):
            continue
        order = list(network.graph.nodes)
        between = order[order.index(conv) : order.index(relu)]
        if any(changes(node, conv.args[0]) for node in between):  # the fused convolution would read the changed value
            continue
        network.set_submodule(str(conv.target), ConvReLU(modules[str(conv.target)], zeros))  # type: ignore[arg-type]
        with network.graph.inserting_before(relu):
            fused = network.graph.call_module(str(conv.target), (conv.args[0], *others))
        relu.replace_all_uses_with(fused)
        for node in dict.fromkeys([relu, before, conv]):
            network.graph.erase_node(node)
        found += 1
    network.recompile()
    return found


class MaxPool(nn.Module):
    """Max pooling without indices."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to the pooled shape."""
        if x.device.type != "cuda":
            pooled: Tensor = self.pool(x)
            return pooled
        from fast_spatial.kernels.pool_cuda import max_pool

        pool = self.pool
        return max_pool(x, _pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding))


def lighten_pools(network: fx.GraphModule) -> int:
    """Replace a network's max pooling by one without indices, in place; returns the number of replacements."""
    found = 0
    for name, module in list(network.named_modules()):
        if not isinstance(module, nn.MaxPool2d) or not _is(module, nn.MaxPool2d):
            continue
        if not (module.ceil_mode or module.return_indices) and _pair(module.dilation) == (1, 1):
            network.set_submodule(name, MaxPool(module))
            found += 1
    return found


def _module(network: fx.GraphModule, node: fx.Node) -> nn.Module:
    return network.get_submodule(str(node.target))


def _reach(kernel: int) -> tuple[int, int]:
    """Blocks of 2 x 2 pixels that a centred stride-two kernel reads before and after its own block."""
    return (kernel // 2 + 1) // 2, kernel // 2 // 2


def _channels(channels: int) -> int:
    """Channels of a block of 2 x 2 pixels, padded to a multiple of eight."""
    return -(-4 * channels // _EIGHT) * _EIGHT


def blocks_of(x_NCHW: Tensor, kernel: int) -> Tensor:
    """Turn blocks of 2 x 2 pixels into single pixels with 4 C channels, and zeros up to a multiple of eight.

    Returns [N, 4 C + zeros, H / 2 + border, W / 2 + border], channels_last. The border is what `kernel` reads.
    """
    N, C, H, W = x_NCHW.shape
    before, after = _reach(kernel)
    x_NCHW = functional.pad(x_NCHW, (0, W % 2, 0, H % 2)) if H % 2 or W % 2 else x_NCHW
    h, w = (H + 1) // 2, (W + 1) // 2
    blocks = x_NCHW.new_zeros((N, before + h + after, before + w + after, _channels(C)))
    inner = blocks[:, before : before + h, before : before + w, : 4 * C].view(N, h, w, 2, 2, C)
    inner.copy_(x_NCHW.permute(0, 2, 3, 1).reshape(N, h, 2, w, 2, C).permute(0, 1, 3, 2, 4, 5))
    return blocks.permute(0, 3, 1, 2)


def kernel_of_blocks(weight_DCKK: Tensor) -> Tensor:
    """The weights of a centred stride-two kernel, rearranged for inputs from `blocks_of`."""
    D, C, K = weight_DCKK.shape[:3]
    first, taps = K // 2 % 2, (K + 1) // 2
    even = functional.pad(weight_DCKK, (first, 1 - first, first, 1 - first))
    blocks = even.view(D, C, taps, 2, taps, 2).permute(0, 3, 5, 1, 2, 4).reshape(D, 4 * C, taps, taps)
    return functional.pad(blocks, (0, 0, 0, 0, 0, _channels(C) - 4 * C))


def unroll_stem(network: fx.GraphModule, conv: nn.Conv2d) -> nn.Conv2d:
    """Replace a stride-two convolution over few channels by a stride-one convolution over blocks.

    Returns the new convolution, or `conv` if it does not apply. The new one has no weights yet: copy those of
    `kernel_of_blocks`, and the bias.
    """
    K = conv.kernel_size[0]
    strides = conv.stride == (2, 2) and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    centred = conv.kernel_size == (K, K) and K % 2 == 1 and K > 1 and conv.padding == (K // 2, K // 2)
    nodes = [node for node in network.graph.nodes if node.op == "call_module" and _module(network, node) is conv]
    if not (_is(conv, nn.Conv2d) and strides and centred and conv.in_channels <= _FEW and len(nodes) == 1):
        return conv
    (node,) = nodes
    channels, taps = _channels(conv.in_channels), (K + 1) // 2
    # Created without data, since initializing weights would advance torch's random generator.
    unrolled = nn.Conv2d(channels, conv.out_channels, taps, device="meta", dtype=conv.weight.dtype)
    unrolled.to_empty(device=conv.weight.device).requires_grad_(False)
    unrolled.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.set_submodule(str(node.target), unrolled)
    with network.graph.inserting_before(node):
        node.args = (network.graph.call_function(blocks_of, (node.args[0], K)),)
    network.recompile()
    return unrolled
