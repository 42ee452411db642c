"""Run a task of processes: in this one, or through torchrun."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import signal
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

from fast_spatial.config.cli import NAME
from fast_spatial.config.fields import to_json
from fast_spatial.config.train import LaunchOptions
from fast_spatial.errors import UserError
from fast_spatial.kernels.host import environment_of_children, usable_cpus
from fast_spatial.runtime.environment import COMMAND_VARIABLE
from fast_spatial.runtime.failures import user_error_of
from fast_spatial.runtime.signals import SIGNALS
from fast_spatial.training.pacing import Pace

SHUTDOWN_SEC = 120
# Runs a task with a configuration and its limit, a Pace or a time, after checking it; returns the seconds it took.
Launch = Callable[[str, Any, Pace | float | None], float]


def launch(task: str, config: Any, limit: Pace | float | None = None) -> float:
    """Check a task's configuration, then run it in this process or through torchrun; returns the seconds it took.

    Args:
        task: a name of `worker.TASKS`.
        config: what to do.
        limit: when it has to be done, a time of `time.monotonic()`, or the pace of a training.

    """
    from fast_spatial import preflight, worker  # they import torch

    start = time.monotonic()
    worker.TASKS[task].preflight(config)
    if task == "train" and config.node_rank == 0:
        preflight.claim_out(config)
    words = [
        task,
        json.dumps(to_json(config)),
        json.dumps(dataclasses.asdict(limit) if isinstance(limit, Pace) else limit),
    ]
    if config.in_process:
        from fast_spatial.runtime import distributed

        try:
            worker.run(task, *map(json.loads, words[1:]))
        finally:
            distributed.stop()
    else:
        # torchrun closes a rendezvous for good when its job is done, so every task has its own.
        about = " ".join(words[:2])
        job = f"{config.rdzv_id}-{zlib.crc32(about.encode()):08x}"
        torchrun(config, job, preflight.local_processes(config), words)
    return time.monotonic() - start


def torchrun(config: LaunchOptions, job: str, processes: int, words: list[str]) -> None:
    """Run the worker module in `processes` processes on this node."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # what matters of its lines is said below
            logging.getLogger(name).setLevel(logging.CRITICAL)
    options = [f"--nproc-per-node={processes}", f"--nnodes={config.nnodes}", f"--max-restarts={config.max_restarts}"]
    options += [f"--signals-to-handle={','.join(_signals_to_handle())}", *_shutdown_options()]
    if config.rdzv_endpoint:
        options += [
            f"--rdzv-backend={config.rdzv_backend}",
            f"--rdzv-endpoint={config.rdzv_endpoint}",
            f"--rdzv-id={job}",
            f"--node-rank={config.node_rank}",
        ]
    else:
        options.append("--standalone")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // processes)))
    # A store for every start of the processes. In the one that agents share, restarted processes may find the addresses
    # that those before them left there, where nobody listens any more.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    set_environment()
    try:
        run.main([*options, "-m", "fast_spatial.worker", *words])
    except ChildFailedError as error:
        raise SystemExit(_report(error.failures)) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None


def _signals_to_handle() -> list[str]:
    """The signals that torchrun hands on to its processes; not those that this one was told to ignore (nohup)."""
    return [number.name for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _shutdown_options() -> list[str]:
    """The seconds between a signal and SIGKILL: a step, another until all processes know, and a checkpoint must fit in.

    torch 2.11 does not take them, and grants 30 s.
    """
    from torch.distributed.run import get_args_parser

    known = "--shutdown-timeout" in get_args_parser().format_help()
    return [f"--shutdown-timeout={SHUTDOWN_SEC}"] if known else []


def _report(failures: dict[int, Any]) -> int:
    """Say which process failed, and why; the exit status."""
    # A user's error comes before what its end does to the others.
    rank = min(failures, key=lambda rank: (user_error_of(failures[rank]) is None, failures[rank].timestamp))
    failure = failures[rank]
    if failure.exitcode - 128 in list(SIGNALS):
        return int(failure.exitcode)
    if error := user_error_of(failure):
        show_error(error)
    else:
        reason = str(failure.message).strip() or "it left no message"
        print(f"{NAME}: rank {rank} failed with exit status {failure.exitcode}: {reason}", file=sys.stderr)
    return 1


def show_error(error: UserError, advice: str = "") -> None:
    """Say in two lines what is wrong and what to do; `advice` where the error has none."""
    print("\n".join(filter(None, [f"{NAME}: {error.message}", error.advice or advice])), file=sys.stderr)


def set_environment() -> None:
    """What processes started from here inherit."""
    os.environ[COMMAND_VARIABLE] = shlex.join(sys.argv)
    os.environ.update(environment_of_children())
    # Threads that spin at torch's barriers take the cores from the loader's, and from everything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
