"""The host: usable CPUs, and the cache folder of compiled kernels, the digits and findings."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def environment_of_children() -> dict[str, str]:
    """This process's environment, with PYTHONPATH extended so that child processes find the package."""
    # Symbolic links are not resolved: in a checkout, kernels/ in the package is a link to the folder beside it.
    root = str(Path(__file__).absolute().parents[2])
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, dict.fromkeys([root, *others])))}


def keep_compiled_kernels() -> None:
    """Name numba's cache folder by a hash of the kernels' sources: numba misses changes in a callee."""
    if "NUMBA_CACHE_DIR" in os.environ:
        return
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    os.environ["NUMBA_CACHE_DIR"] = str(cache_folder() / f"numba-{digest.hexdigest()[:16]}")
    if "numba" in sys.modules:
        sys.modules["numba"].config.reload_config()


def remember(name: str, content: Any) -> None:
    """Write a JSON value to a file in the cache folder, atomically. Errors of the disk are ignored."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=cache_folder(), prefix=".writing-") as folder:
        temporary = Path(folder) / name
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(cache_folder() / name)


def recall(name: str) -> Any:
    """The JSON value of a file in the cache folder; None if it is missing or unreadable."""
    try:
        return json.loads((cache_folder() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Run a block in one process of this machine at a time. Without file locks, it runs unguarded."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            file = held.enter_context(open(cache_folder() / f"{name}.lock", "wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def usable_cpus() -> int:
    """Number of CPUs this process may use: its affinity mask, limited by the cgroup quota (at least 1)."""
    allowed = len(os.sched_getaffinity(0))
    try:
        if CGROUP_V2.exists():
            quota, period = CGROUP_V2.read_text().split()
        else:
            quota, period = (path.read_text().strip() for path in CGROUP_V1)
    except (OSError, ValueError):
        return allowed
    if quota in ("max", "-1"):
        return allowed
    return max(1, min(allowed, int(quota) // int(period)))


def cpus_per_process() -> int:
    """This process's share of the usable CPUs, divided among torchrun's ranks on this node (at least 1)."""
    return max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
