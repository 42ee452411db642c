"""What torchrun starts: one process of a task, described by the JSON of its configuration.

torchrun -m fast_spatial.worker TASK CONFIGURATION LIMIT

both of them JSON; a limit is when the task has to be done: a number, the fields of a `Pace` for a training, or null.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

from fast_spatial.config.commands import CalibrateConfig, EvaluateConfig, LandscapeConfig
from fast_spatial.config.fields import from_json
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.decoders import find_decoding
from fast_spatial.evaluation.evaluate import evaluate_checkpoint
from fast_spatial.evaluation.landscape import landscape
from fast_spatial.runtime import distributed
from fast_spatial.runtime.signals import stop_with_parent
from fast_spatial.training.calibration import calibrate
from fast_spatial.training.pacing import Pace
from fast_spatial.training.train import train

TASKS: dict[str, tuple[type, Callable[..., None]]] = {
    "train": (TrainConfig, train),
    "evaluate": (EvaluateConfig, evaluate_checkpoint),
    "landscape": (LandscapeConfig, landscape),
    "calibrate": (CalibrateConfig, calibrate),
}


def run(task: str, values: dict[str, Any], limit: Any = None) -> None:
    """Join the other processes and run the task, within its limit if there is one."""
    kind, function = TASKS[task]
    config: Any = from_json(kind, values)
    world = distributed.start(config.stall_minutes)
    logging.basicConfig(level=logging.WARNING if world.rank else logging.INFO, format="%(message)s")
    distributed.progress(config.stall_minutes)
    world = find_decoding(config, world)
    if isinstance(limit, dict):
        limit = Pace.from_json(limit)
    function(config, world, limit)


@record
def recorded() -> None:
    """Run the task of the command line; torchrun learns of an error from the file that `record` writes."""
    try:
        run(sys.argv[1], *map(json.loads, sys.argv[2:]))
    except ValueError:
        sys.excepthook = lambda *_: None  # its text says it all, and is printed by the launcher
        raise
    except RuntimeError:
        if distributed.is_shared():  # more likely the end of another process, which is to be reported first
            time.sleep(2)
        raise


def main() -> None:
    """The entry that torchrun calls."""
    stop_with_parent()
    try:
        recorded()
    except KeyboardInterrupt:  # where nothing listens for signals yet, or nothing is to be saved
        sys.exit(130)
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
