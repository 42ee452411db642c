"""The convention of all spatial transforms: matrices, and the exhaustive grid.

For a square image of size S with pixel indices x to the right and y down, the centre is c = (S - 1) / 2. For a
rotation by the angle a and a translation t = (tx, ty), in fractions of the image size, a target pixel has the *source*

    source = R(a) (target - c) + c + (S - 1) t        R(a) = [[cos a, -sin a], [sin a, cos a]]

So a matrix maps target pixels to source pixels, as a warp needs it. A positive angle turns the content
counter-clockwise on the screen (+90 degrees is `rot90(image, 1)`). A positive tx moves it to the left. Pixels outside
the image are black. This is the transform of "Exploring the Landscape of Spatial Robustness" (Engstrom et al., 2019)
under `grid_sample(align_corners=True)`, the behaviour of `grid_sample` when its results were published.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fast_spatial.kernels.limits import GRID_ANGLES, GRID_SHIFTS, GRID_VIEWS, SpatialLimits


@njit(cache=True, nogil=True)
def write_matrix(out_23, angle_deg, tx, ty, side, flip):  # type: ignore[no-untyped-def]
    """Write the 2x3 target-to-source matrix of one view; `flip` mirrors the source horizontally, before the warp."""
    c = (side - 1) / 2.0
    if angle_deg == 0.0:  # the identity must be exact
        cos, sin = 1.0, 0.0
    else:
        cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
    out_23[0, 0], out_23[0, 1], out_23[0, 2] = cos, -sin, c - cos * c + sin * c + (side - 1) * tx
    out_23[1, 0], out_23[1, 1], out_23[1, 2] = sin, cos, c - sin * c - cos * c + (side - 1) * ty
    if flip:
        out_23[0, 0], out_23[0, 1], out_23[0, 2] = -out_23[0, 0], -out_23[0, 1], (side - 1) - out_23[0, 2]


@njit(cache=True, nogil=True)
def _write_matrices(out_N23, params_N3, side):  # type: ignore[no-untyped-def]
    for n in range(out_N23.shape[0]):
        write_matrix(out_N23[n], params_N3[n, 0], params_N3[n, 1], params_N3[n, 2], side, False)


def matrices(params: NDArray[np.float64], side: int) -> NDArray[np.float32]:
    """Target-to-source matrices, float32 [..., 2, 3], of (degrees, tx, ty) rows, float [..., 3].

    `side` is the image size in pixels.

    Raises:
        ValueError: if the last axis of `params` is not of length 3.

    """
    params = np.asarray(params, np.float64)
    if params.shape[-1:] != (3,):
        raise ValueError(f"params has shape {params.shape}: the last axis must be (degrees, tx, ty)")
    flat = np.ascontiguousarray(params.reshape(-1, 3))
    out = np.empty((len(flat), 2, 3), np.float64)
    _write_matrices(out, flat, side)
    return out.reshape(*params.shape[:-1], 2, 3).astype(np.float32)


def grid(limits: SpatialLimits) -> NDArray[np.float64]:
    """The exhaustive attack's 31 x 5 x 5 grid: float64 [775, 3] rows of (degrees, tx, ty), end points included.

    Row `GRID_IDENTITY` is the identity view.
    """
    angles = np.linspace(-limits.degrees, limits.degrees, GRID_ANGLES)
    shifts = np.linspace(-limits.translate, limits.translate, GRID_SHIFTS)
    angles[GRID_ANGLES // 2] = shifts[GRID_SHIFTS // 2] = 0.0
    return np.stack(np.meshgrid(angles, shifts, shifts, indexing="ij"), axis=-1).reshape(-1, 3)


GRID_IDENTITY = GRID_VIEWS // 2
