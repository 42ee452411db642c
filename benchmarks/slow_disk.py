"""Simulate a slow disk in benchmarks: restart the program with the library `slow_disk.c` in LD_PRELOAD."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fast_spatial.kernels.host import cache_folder

SOURCE = Path(__file__).with_suffix(".c")
_LATENCY = "SLOW_DISK_MS"


def restart(latency_ms: float) -> None:
    """Restart this program with `latency_ms` added to each read of an image; returns if it already runs so."""
    if os.environ.get(_LATENCY) == str(latency_ms):
        return
    library = cache_folder() / f"slow_disk-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not library.is_file():
        compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("gcc") or shutil.which("clang") or "cc"
        made = library.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-ldl", "-lpthread"]
        subprocess.run(command, check=True)
        made.replace(library)
    loaded = " ".join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
    os.environ |= {_LATENCY: str(latency_ms), "LD_PRELOAD": loaded}
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.bench", *sys.argv[1:]])
