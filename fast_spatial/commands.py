"""The commands of `launch.py`: one registry row each, with options, preflight and function.

Functions import torch-dependent modules themselves, so that help and flag errors are instant.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fast_spatial import launcher, preflight
from fast_spatial.budget.active_plan import BudgetRequest, open_plan
from fast_spatial.config.cli import NAME, Command, dispatch, options_of
from fast_spatial.config.commands import (
    BenchConfig,
    CheckConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    LandscapeConfig,
    RecipesConfig,
    ReportConfig,
    ReproduceConfig,
)
from fast_spatial.config.fields import decides_numbers, parse, to_json
from fast_spatial.config.recipes import describe, train_config
from fast_spatial.config.rows import DECIDED, RowRequest, requests
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.launcher import set_environment, show_error
from fast_spatial.reproduce import planned_rows, requested_rows, run_rows

# The time of a budget starts here.
STARTED = time.monotonic()
RENAMED = {"check": "check-data"}


def train(config: TrainConfig, raw: dict[str, str]) -> None:
    """Train one model, within a budget if there is one."""
    if not config.is_limited:
        launcher.launch("train", config)
        return
    request = BudgetRequest(config, _plan_flags(raw), [RowRequest(config.mode, raw)])
    with open_plan(request, STARTED) as active:
        if not config.plan_only:
            (row,) = active.plan.rows
            launcher.launch("train", row.train, active.training_deadline(row.train))


def reproduce(config: ReproduceConfig, raw: dict[str, str]) -> None:
    """Train and judge rows of the published table, within a budget if there is one."""
    own = options_of(ReproduceConfig)
    flags = {name: value for name, value in raw.items() if name not in own}
    requested = requests(config, flags)
    preflight.check_report_packages()
    if not config.is_limited:
        rows = requested_rows(requested)
        for row in rows:
            preflight.check_train(row.train)
        run_rows(config, rows)
        return
    request = BudgetRequest(config, _plan_flags(raw), requested, judged=True, may_drop=not config.rows)
    with open_plan(request, STARTED) as active:
        if not config.plan_only:
            run_rows(config, planned_rows(active.plan), active)


def _plan_flags(raw: dict[str, str]) -> dict[str, str]:
    """The given values that decide a budget's plan."""
    known = options_of(ReproduceConfig, TrainConfig)
    kept = ("recipe", "eval_every", "exclude")
    return {name: value for name, value in raw.items() if name in kept or decides_numbers(known[name])}


def report(config: ReportConfig, _: dict[str, str]) -> None:
    """Write the report of runs."""
    from fast_spatial.reporting.report import write_report

    write_report([Path(run) for run in config.runs], Path(config.out or config.runs[0]), config.price)


def export(config: ExportConfig, _: dict[str, str]) -> None:
    """Write a checkpoint's model for other programs."""
    from fast_spatial.models.export import export_checkpoint

    export_checkpoint(config)


def check_data(config: CheckConfig, _: dict[str, str]) -> None:
    """Look for files that would end a run or change its result."""
    from fast_spatial.tools.check_data import check_data as check

    raise SystemExit(check(config))


def recipes(_config: RecipesConfig, _: dict[str, str]) -> None:
    """List the recipes."""
    print(describe())


def bench(config: BenchConfig, _: dict[str, str]) -> None:
    """Run benchmarks in a separate process."""
    command = [sys.executable, "-m", "benchmarks.bench", json.dumps(to_json(config))]
    raise SystemExit(subprocess.run(command, check=False).returncode)


def doctor(config: DoctorConfig, _: dict[str, str]) -> None:
    """Report what this machine can do."""
    from fast_spatial.tools.doctor import run

    raise SystemExit(run(config.data, config.out, config.json))


def _task(name: str) -> Callable[[Any, dict[str, str]], None]:
    """A command that is a task of processes and no more."""

    def run(config: Any, _: dict[str, str]) -> None:
        launcher.launch(name, config)

    return run


def _read_reproduce(raw: dict[str, str]) -> ReproduceConfig:
    """The options of reproduce itself; the others are its trainings'."""
    own = options_of(ReproduceConfig)
    return parse(ReproduceConfig, {name: value for name, value in raw.items() if name in own})


COMMANDS = {
    "train": Command(
        "Train one model. The defaults are the reference recipe.",
        options_of(TrainConfig),
        train_config,
        None,
        train,
    ),
    "evaluate": Command(
        "Judge a checkpoint under every attack.",
        options_of(EvaluateConfig),
        partial(parse, EvaluateConfig),
        None,
        _task("evaluate"),
    ),
    "reproduce": Command(
        "Train and judge the rows of the published table.",
        options_of(ReproduceConfig, TrainConfig, without=DECIDED),
        _read_reproduce,
        None,
        reproduce,
    ),
    "landscape": Command(
        "Judge all 775 views of a fixed subset: loss and accuracy over angle and translation.",
        options_of(LandscapeConfig),
        partial(parse, LandscapeConfig),
        None,
        _task("landscape"),
    ),
    "report": Command(
        "Write report.html and report.md from run folders.",
        options_of(ReportConfig),
        partial(parse, ReportConfig),
        preflight.check_report,
        report,
        positional="runs",
    ),
    "export": Command(
        "Write a checkpoint's model as safetensors or ONNX.",
        options_of(ExportConfig),
        partial(parse, ExportConfig),
        preflight.check_export,
        export,
    ),
    "check-data": Command(
        "Decode every file of a data folder and list what would end a run or change its result.",
        options_of(CheckConfig),
        partial(parse, CheckConfig),
        preflight.check_check_data,
        check_data,
    ),
    "recipes": Command(
        "List the recipes and the options that each sets.",
        options_of(RecipesConfig),
        partial(parse, RecipesConfig),
        None,
        recipes,
    ),
    "bench": Command(
        "Measure the hot parts side by side with what they replace.",
        options_of(BenchConfig),
        partial(parse, BenchConfig),
        preflight.check_bench,
        bench,
        positional="what",
    ),
    "doctor": Command(
        "Report what this machine can do, what is missing, and the line that fixes it.",
        options_of(DoctorConfig),
        partial(parse, DoctorConfig),
        preflight.check_doctor,
        doctor,
    ),
}


def main(argv: list[str]) -> int:
    """Run a command line. A UserError is printed as two lines, with exit status 2."""
    set_environment()
    try:
        dispatch(COMMANDS, argv, renamed=RENAMED)
    except UserError as error:
        known = argv[0] + " " if argv and argv[0] in COMMANDS else ""
        show_error(error, f"see {NAME} {known}--help")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `launch.py train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
