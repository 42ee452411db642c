"""Which nvJPEG DALI's decoder finds.

torchvision brings a copy of its own, under the same library name. Whichever is loaded first serves a whole process, and
with torchvision's (13.0) nvImageCodec decodes no regions on a GPU: it leaves them to the CPU, and warns of every image.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from functools import cache
from pathlib import Path


def installed_libraries() -> list[Path]:
    """NvJPEG's libraries where pip puts them."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    return [path for folder in folders for path in sorted(folder.glob("*/lib/libnvjpeg.so.*"))]


@cache
def load_before_torchvision() -> None:
    """Load the installed nvJPEG, so that it is the one which DALI finds."""
    for path in installed_libraries():
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(path))
