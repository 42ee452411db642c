"""A landscape read from a run's folder. Its files are described in `landscape`, which writes them with torch."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import GRID_ANGLES, GRID_SHIFTS, GRID_VIEWS
from fast_spatial.runtime.run_files import LANDSCAPE, LANDSCAPE_ARRAYS

_KEYS = {"degrees", "translate_px", "num_images", "images_per_class", "seconds", "gpus", "images", "samples"}


@dataclass(frozen=True)
class Landscape:
    """A landscape read from a folder: its JSON, and loss float32 and correct, [N, 31 angles, 5 tx, 5 ty]."""

    folder: Path
    about: dict[str, Any]
    loss: NDArray[np.float32]
    correct: NDArray[np.bool_]

    @property
    def angles_deg(self) -> list[float]:
        """Angles of the views' first axis, in degrees."""
        return _symmetric(self.about["degrees"], GRID_ANGLES)

    @property
    def shifts_px(self) -> list[float]:
        """Translations of the other two axes, in pixels at image size 224."""
        return _symmetric(self.about["translate_px"], GRID_SHIFTS)

    def within(self, angles: int, shifts: int) -> NDArray[np.bool_]:
        """Correct, [N, views], on views within this number of grid steps from the untouched image."""
        a, s = GRID_ANGLES // 2, GRID_SHIFTS // 2
        part = self.correct[:, a - angles : a + angles + 1, s - shifts : s + shifts + 1, s - shifts : s + shifts + 1]
        return part.reshape(len(part), -1)


def _symmetric(limit: float, count: int) -> list[float]:
    return [limit * (step / (count // 2)) for step in range(-(count // 2), count // 2 + 1)]


def read(folder: Path) -> Landscape | None:
    """The landscape in a run's folder, or None if there is none.

    Raises:
        UserError: if it is damaged.

    """
    if not (folder / LANDSCAPE).is_file():
        return None
    try:
        about = json.loads((folder / LANDSCAPE).read_text(encoding="utf-8"))
        with np.load(folder / LANDSCAPE_ARRAYS) as arrays:
            loss = arrays["loss"].astype(np.float32)
            correct = np.unpackbits(arrays["correct"], axis=1, count=GRID_VIEWS).astype(bool)
        if missing := _KEYS - dict(about).keys():
            raise KeyError(*sorted(missing))
        shape = (about["num_images"], GRID_ANGLES, GRID_SHIFTS, GRID_SHIFTS)
        return Landscape(folder, about, loss.reshape(shape), correct.reshape(shape))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder / LANDSCAPE}: it cannot be read ({error})", "run launch.py landscape again") from None
