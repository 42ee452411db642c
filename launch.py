#!/usr/bin/env python3
"""fast_spatial's command line: checks everything, then drives torchrun. `launch.py COMMAND --help` lists the flags."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_spatial.cli import NAME, Command, dispatch, options_of
from fast_spatial.config import (
    BenchConfig,
    CheckConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    LandscapeConfig,
    LaunchOptions,
    RecipesConfig,
    ReportConfig,
    TrainConfig,
    decides_numbers,
    parse,
    to_json,
)
from fast_spatial.environment import COMMAND_VARIABLE
from fast_spatial.pacing import Pace
from fast_spatial.recipe import train_config
from fast_spatial.reproduce import DECIDED, ReproduceConfig, RowRequest, plan, requests
from fast_spatial.reproduce import reproduce as reproduce_rows
from fast_spatial.stopping import SIGNALS

if TYPE_CHECKING:  # imports torch
    from fast_spatial.spending import Spending

# A budget is counted from here.
STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parent
SHUTDOWN_SEC = 120


def train(raw: dict[str, str]) -> None:
    config = train_config(raw)
    if not config.is_limited:
        launch("train", config)
        return

    def configure(recipe: str) -> TrainConfig:
        return train_config({**raw, "recipe": recipe or raw.get("recipe", "")})

    request = RowRequest(config.mode, configure)

    def spend(spending: Spending) -> None:
        (row,) = spending.plan.rows
        launch("train", row.train, spending.of(row, []).pace())

    _in_budget(config, raw, [request], spend, judged=False, may_drop=False)


def evaluate(raw: dict[str, str]) -> None:
    launch("evaluate", parse(EvaluateConfig, raw))


def reproduce(raw: dict[str, str]) -> None:
    own = options_of(ReproduceConfig)
    config = parse(ReproduceConfig, {name: value for name, value in raw.items() if name in own})
    flags = {name: value for name, value in raw.items() if name not in own}
    if config.is_limited:
        spend = partial(reproduce_rows, config, [], launch)  # the rows are the plan's
        _in_budget(config, raw, requests(config, flags), spend, judged=True, may_drop=not config.rows)
        return
    from fast_spatial import preflight  # imports torch

    rows = plan(config, flags)
    for row in rows:
        preflight.check_train(row.train)
    reproduce_rows(config, rows, launch)


def _in_budget(
    config: TrainConfig | ReproduceConfig,
    raw: dict[str, str],
    rows: list[RowRequest],
    spend: Callable[[Spending], None],
    *,
    judged: bool,
    may_drop: bool,
) -> None:
    """Plan for a budget, or find the plan that was begun, and spend it; with --plan-only, plan alone."""
    from fast_spatial import spending  # these import torch
    from fast_spatial.budget import Clock

    known = options_of(ReproduceConfig, TrainConfig)
    kept = ("recipe", "eval_every", "exclude")
    flags = {name: value for name, value in raw.items() if name in kept or decides_numbers(known[name])}
    if "epochs" in flags and raw.get("recipe", "") == "":
        raise ValueError(f"--epochs {flags['epochs']}: the budget decides how many; leave one of them away")
    asked = spending.Asked(config, Path(config.out), flags, rows, raw.get("recipe", ""), config.data, judged, may_drop)
    budget, found = spending.check(asked)
    with Clock(asked.out, STARTED, writes=config.node_rank == 0 and not config.plan_only) as clock:
        opened = spending.open_plan(asked, budget, found, clock, launch)
        if not config.plan_only:
            spend(opened)


def landscape(raw: dict[str, str]) -> None:
    launch("landscape", parse(LandscapeConfig, raw))


def report(raw: dict[str, str]) -> None:
    config = parse(ReportConfig, raw)
    from fast_spatial.files import check_writable
    from fast_spatial.reporting.report import write_report

    check_writable("--out", str(Path(config.out or config.runs[0]) / "report.html"))
    write_report([Path(run) for run in config.runs], Path(config.out or config.runs[0]), config.price)


def export(raw: dict[str, str]) -> None:
    config = parse(ExportConfig, raw)
    from fast_spatial import preflight
    from fast_spatial.export import export_checkpoint

    preflight.check_export(config)
    export_checkpoint(config)


def check(raw: dict[str, str]) -> None:
    config = parse(CheckConfig, raw)
    from fast_spatial import preflight

    preflight.check_check(config)
    from fast_spatial.check import check_data

    raise SystemExit(check_data(config))


def recipes(raw: dict[str, str]) -> None:
    config = parse(RecipesConfig, raw)
    print("timing steps of every recipe; on a CPU, this takes a minute or two", file=sys.stderr)
    _set_environment()  # before torch is imported: steps are timed
    from fast_spatial.recipe_table import list_recipes

    print(list_recipes(config))


def bench(raw: dict[str, str]) -> None:
    from fast_spatial import preflight

    config = parse(BenchConfig, raw)
    preflight.check_bench(config)
    _set_environment()
    command = [sys.executable, "-m", "benchmarks.bench", json.dumps(to_json(config))]
    raise SystemExit(subprocess.run(command, check=False).returncode)


def doctor(raw: dict[str, str]) -> None:
    from fast_spatial.doctor import run
    from fast_spatial.files import check_writable

    config = parse(DoctorConfig, raw)
    check_writable("--json", config.json)
    raise SystemExit(run(config.data, config.out, config.json))


COMMANDS = {
    "train": Command("Train one model; the defaults are the reference recipe.", options_of(TrainConfig), train),
    "evaluate": Command("Judge a checkpoint under every attack.", options_of(EvaluateConfig), evaluate),
    "reproduce": Command(
        "Train and judge the rows of the published table; also takes the flags of train's recipe.",
        options_of(ReproduceConfig, TrainConfig, without=DECIDED) | options_of(ReproduceConfig),
        reproduce,
    ),
    "landscape": Command(
        "Judge all 775 views of a fixed subset: loss and accuracy over angle and translation.",
        options_of(LandscapeConfig),
        landscape,
    ),
    "report": Command(
        "Write report.html and report.md from run folders.", options_of(ReportConfig), report, positional="runs"
    ),
    "export": Command("Write a checkpoint's model as safetensors or ONNX.", options_of(ExportConfig), export),
    "check": Command(
        "Decode every file of a data folder and list what would end a run or change its result.",
        options_of(CheckConfig),
        check,
    ),
    "recipes": Command(
        "List the recipes, what is different in each, and its cost on this machine.",
        options_of(RecipesConfig),
        recipes,
    ),
    "bench": Command(
        "Measure the hot parts side by side with what they replace.", options_of(BenchConfig), bench, positional="what"
    ),
    "doctor": Command("Say what this machine can do, and what is missing.", options_of(DoctorConfig), doctor),
}


def launch(task: str, config: Any, limit: Pace | float | None = None) -> float:
    """Check a task's configuration, then run it in this process or through torchrun; returns the seconds it took.

    Args:
        task: a name of `worker.TASKS`.
        config: what to do.
        limit: when it has to be done, a time of `time.monotonic()`, or the pace of a training.

    """
    from fast_spatial import preflight

    start = time.monotonic()
    if task == "train":
        preflight.check_train(config)
        if config.node_rank == 0:
            preflight.claim_out(config)
    elif task == "evaluate":
        preflight.check_evaluate(config)
    elif task == "landscape":
        preflight.check_landscape(config)
    words = [
        task,
        json.dumps(to_json(config)),
        json.dumps(dataclasses.asdict(limit) if isinstance(limit, Pace) else limit),
    ]
    if config.in_process:
        from fast_spatial import distributed, worker

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

    from kernels.cpus import usable_cpus

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
    _set_environment()
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

    def message(rank: int) -> str:
        found = failures[rank].message
        return str(found if isinstance(found, str) else found.get("message", "")).strip()

    # An error that we raise comes before what its end does to the others.
    rank = min(failures, key=lambda rank: (not message(rank).startswith("ValueError: "), failures[rank].timestamp))
    status = failures[rank].exitcode
    if status - 128 in list(SIGNALS):
        return int(status)
    text = message(rank) or "it left no message"
    if text.startswith("ValueError: "):
        print(f"{NAME}: {text.removeprefix('ValueError: ')}", file=sys.stderr)
    else:
        print(f"{NAME}: rank {rank} failed with exit status {status}: {text.splitlines()[0]}", file=sys.stderr)
    return 1


def _set_environment() -> None:
    """What processes started from here inherit."""
    os.environ[COMMAND_VARIABLE] = shlex.join(sys.argv)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Threads that spin at torch's barriers take the cores from the loader's, and from everything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: list[str]) -> int:
    """Run a command line; wrong input ends in exit status 2 and two lines."""
    try:
        dispatch(COMMANDS, argv)
    except ValueError as error:
        known = argv[0] + " " if argv and argv[0] in COMMANDS else ""
        message, _, advice = str(error).partition("\n")
        print(f"{NAME}: {message}", file=sys.stderr)
        print(advice or f"see {NAME} {known}--help", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `launch.py train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
