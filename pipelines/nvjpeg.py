"""Load the right nvJPEG for DALI's decoder.

torchvision ships its own copy under the same library name, and the copy loaded first serves the whole process. With
torchvision's (13.0), nvImageCodec cannot decode regions on a GPU: it decodes them on the CPU and warns for each image.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from functools import cache
from pathlib import Path


def installed_libraries() -> list[Path]:
    """NvJPEG libraries installed by pip."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    return [path for folder in folders for path in sorted(folder.glob("*/lib/libnvjpeg.so.*"))]


@cache
def load_before_torchvision() -> None:
    """Load the installed nvJPEG, so that DALI uses it instead of torchvision's."""
    for path in installed_libraries():
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(path))
