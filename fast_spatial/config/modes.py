"""The training modes, the rows of the published table, and the name of the digits."""

from __future__ import annotations

from dataclasses import dataclass

from fast_spatial.errors import UserError

DIGITS = "digits"


@dataclass(frozen=True)
class Mode:
    """A training mode: the crop, and the views that the pipeline emits. No later code branches on the mode.

    Attributes:
        center: Resize(256) and CenterCrop(224) instead of RandomResizedCrop.
        untouched: whether the first view is the untouched image.
        warps: the number of randomly warped views; None means the `--views` option.

    """

    center: bool
    untouched: bool
    warps: int | None


MODES = {
    "nocrop": Mode(center=True, untouched=True, warps=0),
    "standard": Mode(center=False, untouched=True, warps=0),
    "random": Mode(center=False, untouched=False, warps=1),
    "worst10": Mode(center=False, untouched=True, warps=None),
}

# Top-1 accuracy in percent, ResNet-18 on ImageNet, judged at 30 degrees / 24 px: (mode, degrees) to natural, random,
# worst-of-10 and grid, from "Exploring the Landscape of Spatial Robustness" (degrees 0: trained without warps).
PUBLISHED = {
    ("standard", 0.0): (71.3, 60.6, 39.9, 20.9),
    ("nocrop", 0.0): (65.4, 54.1, 30.5, 11.8),
    ("random", 30.0): (68.9, 68.0, 54.6, 38.1),
    ("random", 40.0): (68.3, 67.7, 54.9, 38.8),
    ("worst10", 30.0): (69.1, 68.0, 59.4, 48.1),
    ("worst10", 40.0): (68.6, 67.2, 59.3, 48.4),
}


def split_row(row: str) -> tuple[str, float]:
    """(mode, degrees) of "MODE:DEGREES" or "MODE"."""
    mode, _, degrees = row.partition(":")
    if mode not in MODES:
        raise UserError(f"--rows {row}: choose a mode of {', '.join(MODES)}, as in random:40")
    try:
        found = float(degrees or 30)
    except ValueError:
        raise UserError(f"--rows {row}: expected MODE:DEGREES, as in random:40") from None
    if not 0 <= found <= 180:
        raise UserError(f"--rows {row}: the degrees must lie between 0 and 180")
    return mode, found


def row_name(mode: str, degrees: float) -> str:
    """A row's name in tables. Modes without warps have no degrees."""
    return mode if MODES[mode].warps == 0 else f"{mode}, {degrees:g} degrees"
