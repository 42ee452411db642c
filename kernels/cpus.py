"""How many CPUs this process should use."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_V2 = Path("/sys/fs/cgroup/cpu.max")
CGROUP_V1 = (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))


def usable_cpus() -> int:
    """The CPUs this process may use: its affinity mask, cut to the container's cgroup quota (at least 1)."""
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
    """This process's share of the usable CPUs: they are divided among the ranks that torchrun started on this node."""
    return max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
