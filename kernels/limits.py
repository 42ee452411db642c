"""How far views may be moved, and how large they may be; imports nothing, for options are checked with it."""

from __future__ import annotations

from dataclasses import dataclass

# Published limits are given in pixels at this side; elsewhere "nominal px".
NOMINAL_SIDE = 224
# The largest side: coordinates are 32-bit fixed point on CPUs.
MAX_SIDE = 4096


@dataclass(frozen=True)
class SpatialLimits:
    """How far an attack may rotate (degrees, either way) and translate (fraction of the side, either way, per axis)."""

    degrees: float
    translate: float

    def __post_init__(self) -> None:
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"degrees is {self.degrees:g}: rotations reach from 0 to 180 degrees")
        if not 0 <= self.translate <= 1:
            raise ValueError(f"translate is {self.translate:g} of the side: translations reach from 0 to 1")

    @classmethod
    def from_px(cls, degrees: float, translate_px: float | None = None) -> SpatialLimits:
        """Limits from degrees and nominal pixels; without pixels, the published pairing (30 with 24 px, 40 with 32)."""
        if translate_px is None:
            return cls(degrees, (degrees / 10) / 28)
        return cls(degrees, translate_px / NOMINAL_SIDE)

    @property
    def translate_px(self) -> float:
        """The translation limit in nominal pixels (pixels at side 224)."""
        return self.translate * NOMINAL_SIDE
