"""Where this program keeps what it can make again: compiled kernels, the digits data set."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fast_spatial or ~/.cache/fast_spatial; a temporary folder of this user if not writable."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "fast_spatial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    folder = Path(tempfile.gettempdir()) / f"fast_spatial-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def keep_compiled_kernels() -> None:
    """Cache numba's code by the kernels' sources: numba notices no change in a function that another one calls."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    os.environ["NUMBA_CACHE_DIR"] = str(cache_folder() / f"numba-{digest.hexdigest()[:16]}")
    if "numba" in sys.modules:
        sys.modules["numba"].config.reload_config()
