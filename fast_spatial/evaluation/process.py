"""One process of an evaluation or a landscape: its model, its images, and what happens between pieces of work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fast_spatial.config.commands import JudgeOptions
from fast_spatial.data.loading import evaluation_loader
from fast_spatial.data.placing import placement_of
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import FlipJudge, one_shape
from fast_spatial.evaluation.inputs import Inputs
from fast_spatial.pipelines.placement import Decoding, Placement
from fast_spatial.runtime import distributed
from fast_spatial.runtime.device import dtype_of, seed_everything
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.runlog import Bar, say
from fast_spatial.runtime.signals import stop_requests


class JudgingProcess:
    """The model on this process's device, and its batches of images.

    Args:
        config: the options of the evaluation or landscape.
        inputs: the model and the images.
        world: the process group.
        flip: whether to average logits over each view and its mirror image.

    Attributes:
        passes: the model's forward passes, of one shape.
        failures: a line for each batch that this process's GPU failed to decode.

    """

    def __init__(self, config: JudgeOptions, inputs: Inputs, world: World, *, flip: bool = False) -> None:
        seed_everything(0, deterministic=False)
        torch.backends.cudnn.benchmark = False  # verdicts must not depend on which algorithm was timed fastest
        judge = FoldedJudge(inputs.model.to(world.device), dtype_of(config.dtype, world.device))
        self.passes = one_shape(
            FlipJudge(judge) if flip else judge, config.views_per_forward, device=world.device, side=inputs.side
        )
        self.failures: list[str] = []
        self._config, self._inputs, self._world = config, inputs, world

    def batches(
        self, title: str, size: int, *, order: NDArray[np.int64] | None, alone: bool = False, **random_views: Any
    ) -> Bar:
        """Batches of images, with a progress bar.

        Args:
            title: text in front of the bar.
            size: images per batch.
            order: positions of the images, in order; None: all.
            alone: whether this process reads all of them; if not, the processes share them.
            random_views: arguments of `evaluation_loader`; by default the untouched view alone.

        """
        world = dataclasses.replace(self._world, rank=0, world_size=1) if alone else self._world
        loader = evaluation_loader(
            self._inputs.images,
            world,
            side=self._inputs.side,
            batch_size_per_process=size,
            order=order,
            threads=self._config.workers,
            placement=self._placement(),
            on_gpu_failure=self._keep_failure,
            **random_views,
        )
        return Bar(
            loader.epoch(0),
            total=loader.steps_per_epoch,
            images_per_batch=size * world.world_size,
            title=title,
            show=self._world.rank == 0,
        )

    def _placement(self) -> Placement:
        """Where images are decoded and warped: on the CPU after the GPU has failed to decode some."""
        placement = placement_of(self._config, self._world, exact=True)
        return dataclasses.replace(placement, decoding=Decoding("cpu")) if self.failures else placement

    @contextmanager
    def working(self) -> Iterator[Callable[[], None]]:
        """A function to call after each piece of work: it resets the watchdog and obeys a stop request."""
        with stop_requests() as request:

            def moved() -> None:
                distributed.reset_watchdog(self._config.stall_minutes)
                request.obey()

            yield moved
        distributed.reset_watchdog(4 * self._config.stall_minutes)  # other processes may have more survivors

    def _keep_failure(self, what: str) -> None:
        say(what)
        self.failures.append(f"process {self._world.rank}: {what}")
