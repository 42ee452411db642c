"""The commands of `launch.py`: each checks everything, then does its work here or hands it to torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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
from fast_spatial.config.recipes import train_config
from fast_spatial.config.rows import DECIDED, RowRequest, requests
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.launcher import launch, set_environment, show_error
from fast_spatial.runtime.run_files import REPORT

if TYPE_CHECKING:  # it imports torch
    from fast_spatial.budget.spending import Spending

# A budget is counted from here.
STARTED = time.monotonic()


def train(raw: dict[str, str]) -> None:
    """Train one model."""
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
    """Judge a checkpoint."""
    launch("evaluate", parse(EvaluateConfig, raw))


def reproduce(raw: dict[str, str]) -> None:
    """Train and judge rows of the published table."""
    own = options_of(ReproduceConfig)
    config = parse(ReproduceConfig, {name: value for name, value in raw.items() if name in own})
    flags = {name: value for name, value in raw.items() if name not in own}
    asked = requests(config, flags)
    from fast_spatial import preflight  # these import torch
    from fast_spatial.reproduce import plan
    from fast_spatial.reproduce import reproduce as reproduce_rows

    if config.is_limited:
        spend = partial(reproduce_rows, config, [], launch)  # the rows are the plan's
        _in_budget(config, raw, asked, spend, judged=True, may_drop=not config.rows)
        return
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
    from fast_spatial.budget import spending  # these import torch
    from fast_spatial.budget.clock import Clock

    known = options_of(ReproduceConfig, TrainConfig)
    kept = ("recipe", "eval_every", "exclude")
    flags = {name: value for name, value in raw.items() if name in kept or decides_numbers(known[name])}
    if "epochs" in flags and raw.get("recipe", "") == "":
        raise UserError(f"--epochs {flags['epochs']}: the budget decides how many; leave one of them away")
    asked = spending.Asked(config, Path(config.out), flags, rows, raw.get("recipe", ""), config.data, judged, may_drop)
    budget, found = spending.check(asked)
    with Clock(asked.out, STARTED, writes=config.node_rank == 0 and not config.plan_only) as clock:
        opened = spending.open_plan(asked, budget, found, clock, launch)
        if not config.plan_only:
            spend(opened)


def landscape(raw: dict[str, str]) -> None:
    """Judge all views of a fixed subset."""
    launch("landscape", parse(LandscapeConfig, raw))


def report(raw: dict[str, str]) -> None:
    """Write the report of runs."""
    config = parse(ReportConfig, raw)
    from fast_spatial.reporting.report import write_report
    from fast_spatial.runtime.files import check_writable

    check_writable("--out", str(Path(config.out or config.runs[0]) / REPORT))
    write_report([Path(run) for run in config.runs], Path(config.out or config.runs[0]), config.price)


def export(raw: dict[str, str]) -> None:
    """Write a checkpoint's model for other programs."""
    config = parse(ExportConfig, raw)
    from fast_spatial import preflight
    from fast_spatial.models.export import export_checkpoint

    preflight.check_export(config)
    export_checkpoint(config)


def check(raw: dict[str, str]) -> None:
    """Look for files that would end a run or change its result."""
    config = parse(CheckConfig, raw)
    from fast_spatial import preflight

    preflight.check_check(config)
    from fast_spatial.tools.check_data import check_data

    raise SystemExit(check_data(config))


def recipes(raw: dict[str, str]) -> None:
    """List the recipes."""
    config = parse(RecipesConfig, raw)
    print("timing steps of every recipe; on a CPU, this takes a minute or two", file=sys.stderr)
    set_environment()  # before torch is imported: steps are timed
    from fast_spatial.tools.recipe_table import list_recipes

    print(list_recipes(config))


def bench(raw: dict[str, str]) -> None:
    """Run benchmarks, as a process of their own."""
    from fast_spatial import preflight

    config = parse(BenchConfig, raw)
    preflight.check_bench(config)
    set_environment()
    command = [sys.executable, "-m", "benchmarks.bench", json.dumps(to_json(config))]
    raise SystemExit(subprocess.run(command, check=False).returncode)


def doctor(raw: dict[str, str]) -> None:
    """Look at this machine."""
    from fast_spatial.runtime.files import check_writable
    from fast_spatial.tools.doctor import run

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


def main(argv: list[str]) -> int:
    """Run a command line; wrong input ends in exit status 2 and two lines."""
    try:
        dispatch(COMMANDS, argv)
    except UserError as error:
        known = argv[0] + " " if argv and argv[0] in COMMANDS else ""
        show_error(error, f"see {NAME} {known}--help")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `launch.py train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
