"""Crops, from which Triton makes views on demand. B images, V views of each, S image size, C = 3 channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Crops:
    """A batch before its views are made; all tensors are on one device.

    No method synchronizes the device. Without a GPU, the kernels run in Triton's interpreter (TRITON_INTERPRET=1).

    Attributes:
        images: uint8 [B, S, S, 3], with the decoded colours.
        matrices: float32 [B, V, 2, 3], target-to-source pixels (see `kernels.spatial`).
        numbers: float32 [B, len(Colour)], each image's colour numbers (see `kernels.layout`).

    """

    images: Tensor
    matrices: Tensor
    numbers: Tensor

    def views(self) -> Tensor:
        """Views, uint8 [B, V, S, S, 3]."""
        from fast_spatial.kernels import warp_cuda

        return warp_cuda.warp(self.images, self.matrices, self._colours())

    def normalized(self, scale_C: Tensor, shift_C: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalized views, the network's input: [B * V, 3, S, S] channels_last, value * scale + shift."""
        from fast_spatial.kernels import warp_cuda

        return warp_cuda.warp_normalized(self.images, self.matrices, self._colours(), scale_C, shift_C, dtype)

    def _colours(self) -> Tensor:
        """Each image's colour matrix, float32 [B, 3, 4]."""
        from fast_spatial.kernels import warp_cuda

        return warp_cuda.colour_matrices(self.images, self.numbers)
