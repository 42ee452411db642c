"""Run a task: in this process, or in processes that torchrun starts."""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import logging
import os
import shlex
import signal
import sys
import time
import zlib
from typing import Any

from fast_spatial.config.cli import NAME
from fast_spatial.config.fields import identity, to_json
from fast_spatial.config.train import LaunchOptions
from fast_spatial.errors import UserError
from fast_spatial.kernels.host import environment_of_children, usable_cpus
from fast_spatial.runtime.environment import COMMAND_VARIABLE
from fast_spatial.runtime.failures import user_error_of
from fast_spatial.runtime.signals import SIGNALS
from fast_spatial.training.pacing import TrainingDeadline

SHUTDOWN_SEC = 120


def launch(task: str, config: Any, limit: TrainingDeadline | float | None = None) -> float:
    """Check a task's configuration, then run it in this process or through torchrun; returns the wall-clock seconds.

    In this process, an error that ends it (a crash, the watchdog) ends the tasks that would follow, too.

    Args:
        task: a key of `worker.TASKS`.
        config: the task's configuration.
        limit: the deadline: a time of `time.monotonic()`, or a `TrainingDeadline`.

    """
    from fast_spatial import preflight, worker  # they import torch

    start = time.monotonic()
    worker.TASKS[task].preflight(config)
    if task == "train" and config.node_rank == 0:
        preflight.claim_out(config)
    words = [
        task,
        json.dumps(to_json(config)),
        json.dumps(dataclasses.asdict(limit) if isinstance(limit, TrainingDeadline) else limit),
    ]
    if config.in_process:
        from fast_spatial.runtime import distributed

        faulthandler.enable(all_threads=True)
        gc.collect()  # the memory of a task that has failed: until now, its error referred to it
        try:
            worker.run(task, *map(json.loads, words[1:]))
        finally:
            distributed.stop()
            gc.collect()  # a training is referred to by its loader's callbacks
    else:
        torchrun(config, rendezvous_id(task, config), preflight.local_processes(config), words)
    return time.monotonic() - start


def rendezvous_id(task: str, config: Any) -> str:
    """A task's id at the rendezvous, of what all nodes agree on: --node-rank or --data may differ between them.

    torchrun closes a rendezvous for good after its job, so every task gets its own id.
    """
    about = {**identity(config), "out": getattr(config, "out", "")}
    return f"{config.rdzv_id}-{zlib.crc32(f'{task} {json.dumps(about)}'.encode()):08x}"


def torchrun(config: LaunchOptions, job: str, processes: int, words: list[str]) -> None:
    """Run the worker module in `processes` processes on this node."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # `_report` prints the relevant part
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
    # Each start of the processes gets its own store. In a store that agents share, restarted processes may find stale
    # addresses of the previous processes.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    try:
        run.main([*options, "-m", "fast_spatial.worker", *words])
    except ChildFailedError as error:
        raise SystemExit(_report(error.failures)) from None
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None


def _signals_to_handle() -> list[str]:
    """The signals that torchrun forwards to its processes, except signals that this process ignores (nohup)."""
    return [number.name for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _shutdown_options() -> list[str]:
    """The option for the seconds between a signal and SIGKILL.

    Two steps and a checkpoint must fit: the signal reaches all ranks in the second step. torch 2.11 lacks the option
    and allows 30 s.
    """
    from torch.distributed.run import get_args_parser

    known = "--shutdown-timeout" in get_args_parser().format_help()
    return [f"--shutdown-timeout={SHUTDOWN_SEC}"] if known else []


def _report(failures: dict[int, Any]) -> int:
    """Print which process failed, and why; returns the exit status."""
    # A UserError takes precedence over the failures that it causes in other ranks.
    rank = min(failures, key=lambda rank: (user_error_of(failures[rank]) is None, failures[rank].timestamp))
    failure = failures[rank]
    if failure.exitcode - 128 in list(SIGNALS):
        return int(failure.exitcode)
    if error := user_error_of(failure):
        show_error(error, f"see {NAME} --help")
    else:
        reason = (str(failure.message).strip() or "no error message").splitlines()[0]  # its traceback was printed
        print(f"{NAME}: rank {rank} failed with exit status {failure.exitcode}: {reason}", file=sys.stderr)
    return 1


def show_error(error: UserError, advice: str = "") -> None:
    """Print an error and its advice as two lines; `advice` is the default."""
    print("\n".join(filter(None, [f"{NAME}: {error.message}", error.advice or advice])), file=sys.stderr)


def set_environment() -> None:
    """Set the environment variables of this process and its children; before torch is imported, which reads some."""
    os.environ[COMMAND_VARIABLE] = shlex.join(sys.argv)
    os.environ.update(environment_of_children())
    # Threads that spin at torch's barriers would take CPU time from the loader's threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
