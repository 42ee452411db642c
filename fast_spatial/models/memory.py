"""An estimate of the GPU memory a training run needs, before it starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fast_spatial.models import classifier

_GIB = 1 << 30


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of a process in GiB: weights with gradients and momentum, saved activations, and views."""

    weights_gib: float
    activations_gib: float
    views_gib: float

    @property
    def total_gib(self) -> float:
        """The sum."""
        return self.weights_gib + self.activations_gib + self.views_gib


def estimate(
    arch: str, num_classes: int, side: int, batch: int, grad_accum_steps: int, views: int, half: bool
) -> MemoryEstimate:
    """Estimate from one forward pass on the meta device.

    Args:
        arch: torchvision name of the network.
        num_classes: outputs of the network.
        side: image size, pixels.
        batch: images per step and process.
        grad_accum_steps: micro-batches per step.
        views: views per image; the loader holds three batches of them as uint8.
        half: whether activations have 16 bits.

    """
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        keep.append(tensor)
        return tensor

    keep: list[Tensor] = []
    probe = 2
    net = classifier.shapes_of(arch, num_classes)
    with torch.device("meta"):
        images = torch.empty(probe, 3, side, side).to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in net.parameters())
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        net(images)
    per_image = sum(saved.values()) / probe / (2 if half else 1)
    part = -(-batch // grad_accum_steps)
    scored = batch * views * 64 * (side / 2) ** 2 * 2 * (2 if half else 4) if views > 1 else 0.0
    return MemoryEstimate(
        weights_gib=parameters * (4 + 4 + 4 + (2 if half else 4)) / _GIB,
        activations_gib=max(per_image * part, scored) / _GIB,
        views_gib=3 * batch * views * side * side * 3 / _GIB,
    )
