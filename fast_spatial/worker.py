"""One process of a task: the module that torchrun starts.

torchrun -m fast_spatial.worker TASK CONFIGURATION LIMIT

CONFIGURATION and LIMIT are JSON. LIMIT is the deadline: a time of `time.monotonic()`, the fields of a
`TrainingDeadline` for a training, or null.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from fast_spatial import preflight
from fast_spatial.config.commands import CalibrateConfig, EvaluateConfig, LandscapeConfig
from fast_spatial.config.fields import from_json
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.decoders import find_decoding
from fast_spatial.errors import UserError
from fast_spatial.evaluation.evaluate import evaluate_checkpoint
from fast_spatial.evaluation.landscape import landscape
from fast_spatial.runtime import distributed
from fast_spatial.runtime.failures import leave_failure
from fast_spatial.runtime.signals import stop_with_parent
from fast_spatial.training.calibration import calibrate
from fast_spatial.training.pacing import TrainingDeadline
from fast_spatial.training.train import train


class Task(NamedTuple):
    """Work of one or more processes.

    Attributes:
        config: the kind of its configuration.
        preflight: what is checked once, before a process is started or a file written.
        run: what each process does, with the configuration, the processes and the limit.

    """

    config: type
    preflight: Callable[[Any], object]
    run: Callable[..., None]


TASKS = {
    "train": Task(TrainConfig, preflight.check_train, train),
    "evaluate": Task(EvaluateConfig, preflight.check_evaluate, evaluate_checkpoint),
    "landscape": Task(LandscapeConfig, preflight.check_landscape, landscape),
    "calibrate": Task(CalibrateConfig, preflight.check_launch, calibrate),
}


def run(task: str, values: dict[str, Any], limit: Any = None) -> None:
    """Join the process group and run the task, with its deadline if there is one."""
    config: Any = from_json(TASKS[task].config, values)
    world = distributed.start(config.stall_minutes)
    logging.basicConfig(level=logging.WARNING if world.rank else logging.INFO, format="%(message)s")
    distributed.reset_watchdog(config.stall_minutes)
    world = find_decoding(config, world)
    if isinstance(limit, dict):
        limit = TrainingDeadline.from_json(limit)
    TASKS[task].run(config, world, limit)


def main() -> None:
    """Entry point of a process that torchrun starts."""
    faulthandler.enable(all_threads=True)
    stop_with_parent()
    try:
        run(sys.argv[1], *map(json.loads, sys.argv[2:]))
    except KeyboardInterrupt:  # no signal handler is installed yet, or the task saves nothing
        sys.exit(130)
    except UserError as error:
        leave_failure(error)
        sys.exit(1)  # the launcher prints the error, once for all processes
    except Exception as error:
        if isinstance(error, RuntimeError) and distributed.is_initialized():
            time.sleep(2)  # probably caused by the failure of another rank, which should be reported first
        leave_failure(error)
        print(f"rank {os.environ.get('RANK', '0')}:", file=sys.stderr)
        raise
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
