"""Models: torchvision's classifiers behind their normalization, BatchNorm over groups, and BlurPool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, batch_norm, pad
from torch.overrides import TorchFunctionMode

from kernels.warp import normalize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Their training forward returns more than one tensor.
_MANY_OUTPUTS = ("googlenet", "inception_v3")


def known_archs() -> list[str]:
    """The architectures that can be trained: torchvision's classifiers whose forward returns one tensor."""
    return [a for a in torchvision.models.list_models(module=torchvision.models) if a not in _MANY_OUTPUTS]


class Classifier(nn.Module):
    """Logits [N, K] of views, uint8 [N, S, S, 3], or images, float [N, 3, S, S] in [0, 1]: it normalizes by itself."""

    scale: Tensor
    shift: Tensor

    def __init__(
        self, net: nn.Module, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
    ) -> None:
        super().__init__()
        self.net = net
        deviations = torch.tensor(std)
        self.register_buffer("scale", 1 / (255 * deviations), persistent=False)  # of values up to 255
        self.register_buffer("shift", -torch.tensor(mean) / deviations, persistent=False)

    def normalize(self, images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Views or images to what the network takes, [N, 3, S, S]; of views float32, of images theirs, unless told."""
        if images.dtype == torch.uint8:
            return normalize(images, self.scale, self.shift, dtype or torch.float32)
        normalized = torch.addcmul(self.shift.view(3, 1, 1), 255 * images, self.scale.view(3, 1, 1))
        return normalized if dtype is None else normalized.to(dtype)

    def forward(self, images: Tensor, *, normalized: bool = False) -> Tensor:
        """Logits; with `normalized`, of what `normalize` would make of images."""
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        logits: Tensor = self.net(images if normalized else self.normalize(images, dtype))
        return logits


def build(arch: str, num_classes: int) -> nn.Module:
    """A torchvision classifier with fresh weights, channels_last.

    Raises:
        ValueError: on an architecture torchvision does not have, or one that cannot be trained here.

    """
    if arch not in known_archs():
        why = (
            "its training forward returns several tensors" if arch in _MANY_OUTPUTS else "torchvision has no such model"
        )
        raise ValueError(
            f"--arch {arch}: {why}; choose one of {', '.join(known_archs()[:6])}, ... (resnet18 by default)"
        )
    net: nn.Module = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def compile_network(net: nn.Module) -> None:
    """Let torch.compile fuse a network that always meets one shape; one that it cannot compile stays as it is.

    The module, its names and its weights stay the same, so that it is saved and copied as before.
    """
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True  # it logs what it could not compile
    net.compile(dynamic=False)


class _EmptyOnMeta(TorchFunctionMode):
    """New parameters have no data; other tensors do, since some networks (RegNet) compute their widths with them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def shapes_of(arch: str, num_classes: int) -> nn.Module:
    """A classifier without data, to ask for names and shapes."""
    with _EmptyOnMeta():
        return build(arch, num_classes).to("meta")


def to_unit(views: Tensor) -> Tensor:
    """uint8 [N, S, S, 3] to float32 [N, 3, S, S] in [0, 1], channels_last without moving a byte more than needed."""
    return views.permute(0, 3, 1, 2).to(torch.float32).div_(255)


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
