"""Limits of rotation, translation and image size, and the size of the grid.

Imports only the standard library: options are checked and budgets planned with it.
"""

from __future__ import annotations

from dataclasses import dataclass

# Published translations are in pixels at this image size; "nominal px" elsewhere in the code.
NOMINAL_SIDE = 224
# Largest image size in pixels: coordinates are 32-bit fixed point on CPUs.
MAX_SIDE = 4096
# The exhaustive grid: angles, shifts per axis, and views.
GRID_ANGLES, GRID_SHIFTS = 31, 5
GRID_VIEWS = GRID_ANGLES * GRID_SHIFTS * GRID_SHIFTS


@dataclass(frozen=True)
class SpatialLimits:
    """Limits of an attack: rotation (degrees, either way) and translation (fraction of the image size, per axis).

    Raises:
        ValueError: if degrees is not in [0, 180] or translate is not in [0, 1].

    """

    degrees: float
    translate: float

    def __post_init__(self) -> None:
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees is {self.degrees:g}: must be between 0 and 180")
        if not 0 <= self.translate <= 1:
            raise ValueError(f"translate is {self.translate:g}: must be between 0 and 1 (fraction of the image size)")

    @classmethod
    def from_px(cls, degrees: float, translate_px: float | None = None) -> SpatialLimits:
        """Limits from degrees and nominal pixels; by default the published pairing (30 with 24 px, 40 with 32)."""
        if translate_px is None:
            return cls(degrees, (degrees / 10) / 28)
        return cls(degrees, translate_px / NOMINAL_SIDE)

    @property
    def translate_px(self) -> float:
        """The translation limit in nominal pixels (pixels at image size 224)."""
        return self.translate * NOMINAL_SIDE


STILL = SpatialLimits(0.0, 0.0)
