"""Loaders of training and evaluation batches."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from fast_spatial.config.modes import MODES
from fast_spatial.config.train import TrainConfig
from fast_spatial.data.placing import placement_of
from fast_spatial.kernels.limits import STILL, SpatialLimits
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.pipelines.dataset import ImageIndex
from fast_spatial.pipelines.loader import Loader
from fast_spatial.pipelines.placement import Placement
from fast_spatial.pipelines.sampler import BatchSampler, Shard
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.runlog import say


def training_views(config: TrainConfig) -> Views:
    """The views of each training image."""
    untouched = MODES[config.mode].untouched
    return Views(config.num_views - untouched, config.limits, untouched_first=untouched)


def training_loader(
    config: TrainConfig,
    images: ImageIndex,
    world: World,
    *,
    side: int | Callable[[int, int], int],
    global_batch_size: int = 0,
    on_bad_images: Callable[[dict[int, str], Collection[int]], None] | None = None,
    bad_images: Collection[int] = (),
    on_gpu_failure: Callable[[str], None] = say,
) -> Loader:
    """This process's training batches.

    Args:
        config: the training.
        images: its training split.
        world: this process and its group.
        side: image size in pixels, as in `Loader`.
        global_batch_size: replaces the training's; 0: the training's.
        on_bad_images: as in `Loader`.
        bad_images: as in `BatchSampler`.
        on_gpu_failure: as in `Loader`.

    """
    sampler = BatchSampler(
        images,
        global_batch_size=global_batch_size or config.global_batch_size,
        seed=config.seed,
        train=True,
        shard=Shard(world.rank, world.world_size),
        bad_images=bad_images,
    )
    return Loader(
        sampler,
        augmentation=Augmentation(
            center=MODES[config.mode].center,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            flip_prob=config.flip_prob,
            jitter=config.jitter,
            lighting_std=config.lighting,
        ),
        views=training_views(config),
        side=side,
        largest_side=config.image_size,
        threads=config.workers or None,
        device=world.device,
        placement=placement_of(config, world, exact=config.deterministic),
        on_bad_images=on_bad_images,
        on_gpu_failure=on_gpu_failure,
    )


def evaluation_loader(
    images: ImageIndex,
    world: World,
    *,
    side: int,
    batch_size_per_process: int,
    warps: int = 0,
    limits: SpatialLimits = STILL,
    seed: int = 0,
    order: NDArray[np.int64] | None = None,
    threads: int = 0,
    placement: Placement | None = None,
    on_gpu_failure: Callable[[str], None] = say,
) -> Loader:
    """Evaluation batches: the identity view of each image, and random warps of it.

    Args:
        images: the split to evaluate.
        world: this process and its group, which share the images.
        side: image size, pixels.
        batch_size_per_process: images per batch and process.
        warps: number of random views per image, besides the identity view.
        limits: warp limits of the random views.
        seed: seed of the random views.
        order: positions of the images to visit, in order; default: all.
        threads: loader threads; 0: one per CPU of this process.
        placement: as in `Loader`.
        on_gpu_failure: as in `Loader`.

    """
    sampler = BatchSampler(
        images,
        global_batch_size=batch_size_per_process * world.world_size,
        seed=seed,
        train=False,
        shard=Shard(world.rank, world.world_size),
        order=order,
    )
    return Loader(
        sampler,
        augmentation=Augmentation(center=True),
        views=Views(warps, limits),
        side=side,
        threads=threads or None,
        device=world.device,
        placement=placement,
        on_gpu_failure=on_gpu_failure,
    )
