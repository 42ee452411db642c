"""Models: torchvision's classifiers with built-in normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fast_spatial.errors import UserError
from fast_spatial.kernels.warp import normalize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Their forward pass returns several tensors in training.
_MANY_OUTPUTS = ("googlenet", "inception_v3")


def known_archs() -> list[str]:
    """The architectures that can be trained: torchvision's classifiers with a single output tensor."""
    return [a for a in torchvision.models.list_models(module=torchvision.models) if a not in _MANY_OUTPUTS]


class Classifier(nn.Module):
    """Logits [N, K] of views, uint8 [N, S, S, 3], or images, float [N, 3, S, S] in [0, 1]; normalizes its input."""

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
        """Views or images to the network's input, [N, 3, S, S]; dtype: float32 for views, kept for images."""
        if images.dtype == torch.uint8:
            return normalize(images, self.scale, self.shift, dtype or torch.float32)
        normalized = torch.addcmul(self.shift.view(3, 1, 1), 255 * images, self.scale.view(3, 1, 1))
        return normalized if dtype is None else normalized.to(dtype)

    def forward(self, images: Tensor, *, normalized: bool = False) -> Tensor:
        """Logits; with `normalized`, `images` are already normalized."""
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        logits: Tensor = self.net(images if normalized else self.normalize(images, dtype))
        return logits


def build(arch: str, num_classes: int) -> nn.Module:
    """A torchvision classifier with fresh weights, channels_last.

    Raises:
        UserError: if torchvision does not have the architecture, or it cannot be trained here.

    """
    if arch not in known_archs():
        why = (
            "its forward pass returns several tensors in training"
            if arch in _MANY_OUTPUTS
            else "torchvision has no such model"
        )
        raise UserError(
            f"--arch {arch}: {why}; choose one of {', '.join(known_archs()[:6])}, ... (resnet18 by default)"
        )
    net: nn.Module = torchvision.models.get_model(arch, weights=None, num_classes=num_classes)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def compile_network(net: nn.Module) -> None:
    """Compile a network for one input shape with torch.compile; if that fails, the network runs uncompiled.

    The module, its parameter names and its weights stay the same, so it is saved and copied as before.
    """
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True  # failures are logged
    net.compile(dynamic=False)


class _EmptyOnMeta(TorchFunctionMode):
    """New parameters are on the meta device. Other tensors have data: RegNet computes its widths with them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def shapes_of(arch: str, num_classes: int) -> nn.Module:
    """A classifier on the meta device, for parameter names and shapes."""
    with _EmptyOnMeta():
        return build(arch, num_classes).to("meta")


def to_unit(views: Tensor) -> Tensor:
    """uint8 [N, S, S, 3] to float32 [N, 3, S, S] in [0, 1], channels_last; the layout needs no copy."""
    return views.permute(0, 3, 1, 2).to(torch.float32).div_(255)
