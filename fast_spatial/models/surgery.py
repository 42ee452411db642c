"""Changes to a network that keep its names and weights: BatchNorm over groups, BlurPool, wider maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, pad


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over groups of images, as 8-GPU DataParallel had it: running statistics from the first group."""

    group_size = 0

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or len(input) <= self.group_size:
            return super().forward(input)
        first, *others = torch.split(input, self.group_size)
        outputs = [super().forward(first)]
        for group in others:
            outputs.append(batch_norm(group, None, None, self.weight, self.bias, True, 0.0, self.eps))
        return torch.cat(outputs)


def group_batch_norm(net: nn.Module, group_size: int) -> None:
    """Make every BatchNorm2d of a network normalize over groups of `group_size` images while training."""
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GroupedBatchNorm2d
            module.group_size = group_size  # type: ignore[assignment]


def blur_before_strides(net: nn.Module) -> None:
    """Blur what every convolution with a stride takes (BlurPool), the first one of few channels excepted.

    The network's names and weights stay the same: a checkpoint must say that it was trained so.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.in_channels >= 16:
            module.register_forward_pre_hook(_blur)


def has_blurpool(net: nn.Module) -> bool:
    """Whether a network blurs before its strides."""
    return any(_blur in module._forward_pre_hooks.values() for module in net.modules())


def _blur(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """The binomial filter [1, 2, 1] x [1, 2, 1] / 16, zeros outside: two means over 2 x 2."""
    return avg_pool2d(avg_pool2d(inputs[0], 2, stride=1, padding=1), 2, stride=1)


def widen_before_strides(net: nn.Module) -> None:
    """Let no convolution with a stride take maps narrower than it: columns of zeros are added, and nothing changes.

    For training in bfloat16 on CPUs: oneDNN (3.12, with AVX-512) leaves chance in the gradient of such a convolution's
    weights, up to 1e38 where 0 is right, for those that meet nothing but padding. ResNet-18's fourth layer at a side
    of 16 is one. A network that blurs must blur first.
    """
    for conv in [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride[1] > 1]:
        # One pixel stays one pixel where the padding is half of the kernel, as in all of torchvision's networks (but
        # for AlexNet's first layer, which can take no map so narrow).
        if conv.kernel_size[1] == 2 * int(conv.padding[1]) + 1 > 1:
            conv.register_forward_pre_hook(_widen)


def _widen(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    missing = module.stride[1] - inputs[0].shape[3]
    return pad(inputs[0], (0, missing)) if missing > 0 else inputs[0]
