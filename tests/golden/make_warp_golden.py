"""Make warp_golden.npz: what the warp of images by (degrees, tx, ty) is, computed without this project's code.

The views come from PyTorch's `affine_grid` and `grid_sample` in float64, both under `align_corners=True`, their only
meaning when the published results were made: in coordinates of [-1, 1] the source of a target is R(a) target + 2 t.

    python tests/golden/make_warp_golden.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.nn.functional import affine_grid, grid_sample

SIDE = 25
# Rows of (degrees, tx, ty), the translation as a fraction of the side; the first four move or turn one thing only.
PARAMS = [
    (0.0, 6 / 24, 0.0),
    (0.0, 0.0, 6 / 24),
    (30.0, 0.0, 0.0),
    (-30.0, 0.0, 0.0),
    (30.0, 24 / 224, -24 / 224),
    (-40.0, 32 / 224, 32 / 224),
]


def torch_views(images_BSSC: np.ndarray, params: list[tuple[float, float, float]], align_corners: bool) -> np.ndarray:
    """float64 [B, V, S, S, 3], of 255."""
    images_BCSS = torch.from_numpy(images_BSSC).double().permute(0, 3, 1, 2)
    views = []
    for degrees, tx, ty in params:
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        theta = torch.tensor([[cos, -sin, 2 * tx], [sin, cos, 2 * ty]], dtype=torch.float64)
        locations = affine_grid(
            theta.expand(len(images_BSSC), 2, 3), list(images_BCSS.shape), align_corners=align_corners
        )
        views.append(
            grid_sample(images_BCSS, locations, mode="bilinear", padding_mode="zeros", align_corners=align_corners)
        )
    return torch.stack(views, dim=1).permute(0, 1, 3, 4, 2).numpy()


def main() -> None:
    photograph = Image.fromarray(load_sample_image("china.jpg")).crop((100, 0, 527, 427))
    photograph = photograph.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    noise = np.random.Generator(np.random.Philox(0)).choice(np.array([0, 255], np.uint8), (SIDE, SIDE, 3))
    images = np.stack([np.asarray(photograph), noise])
    # Views in units of 1/256 of a grey level.
    views = np.rint(torch_views(images, PARAMS, align_corners=True) * 256).astype(np.uint16)
    target = Path(__file__).parent / "warp_golden.npz"
    np.savez_compressed(target, images=images, params=np.array(PARAMS), views=views)


if __name__ == "__main__":
    main()
