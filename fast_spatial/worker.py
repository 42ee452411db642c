"""What torchrun starts: one process of a task, described by the JSON of its configuration.

torchrun -m fast_spatial.worker TASK JSON
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

from fast_spatial import distributed
from fast_spatial.config import EvaluateConfig, TrainConfig, from_json
from fast_spatial.evaluate import evaluate_checkpoint
from fast_spatial.train import train

TASKS: dict[str, tuple[type, Callable[..., None]]] = {
    "train": (TrainConfig, train),
    "evaluate": (EvaluateConfig, evaluate_checkpoint),
}


def run(task: str, values: dict[str, Any]) -> None:
    """Join the other processes and run the task."""
    kind, function = TASKS[task]
    config: Any = from_json(kind, values)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    world = distributed.start(config.stall_minutes)
    distributed.progress(config.stall_minutes)
    try:
        function(config, world)
    finally:
        distributed.stop()


@record
def main() -> None:
    """The entry that torchrun calls."""
    run(sys.argv[1], json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
