"""Changes to a network that keep its parameters: ghost BatchNorm, BlurPool, padded feature maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, pad


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Ghost BatchNorm, as in 8-GPU DataParallel: groups of images; running statistics from the first group."""

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
    """Make every BatchNorm2d of a network normalize over groups of `group_size` images in training."""
    for module in net.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GroupedBatchNorm2d
            module.group_size = group_size  # type: ignore[assignment]


def blur_before_strides(net: nn.Module) -> None:
    """Blur the input of every strided convolution with at least 16 input channels (BlurPool).

    Parameter names and shapes stay the same, so a checkpoint must record that its network blurs.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and max(module.stride) > 1 and module.in_channels >= 16:
            module.register_forward_pre_hook(_blur)


def has_blurpool(net: nn.Module) -> bool:
    """Whether a network blurs before strided convolutions."""
    return any(_blur in module._forward_pre_hooks.values() for module in net.modules())


def _blur(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """The binomial filter [1, 2, 1] x [1, 2, 1] / 16 with zero padding, as two 2 x 2 means."""
    return avg_pool2d(avg_pool2d(inputs[0], 2, stride=1, padding=1), 2, stride=1)


def widen_before_strides(net: nn.Module) -> None:
    """Pad feature maps narrower than a convolution's stride with columns of zeros; the outputs do not change.

    For bfloat16 training on CPUs. There, oneDNN 3.12 (AVX-512) leaves random values, up to 1e38, in the gradient of
    weights that see only padding; 0 is correct. ResNet-18's fourth layer at image size 16 is an example. BlurPool must
    be added first.
    """
    for conv in [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.stride[1] > 1]:
        # An output of one pixel stays one pixel if the padding is half of the kernel. This holds for all torchvision
        # networks except AlexNet's first layer, which cannot take maps this narrow.
        if conv.kernel_size[1] == 2 * int(conv.padding[1]) + 1 > 1:
            conv.register_forward_pre_hook(_widen)


def _widen(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    missing = module.stride[1] - inputs[0].shape[3]
    return pad(inputs[0], (0, missing)) if missing > 0 else inputs[0]
