"""The batches that a training is made of."""

from __future__ import annotations

from collections.abc import Callable, Collection

from fast_spatial.config import MODES, TrainConfig
from fast_spatial.distributed import World
from fast_spatial.placing import placement_of
from fast_spatial.runlog import say
from kernels.sampling import TRAINING, augmentation_settings, pack_key
from pipelines.dataset import ImageIndex
from pipelines.loader import Loader


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
    """This process's batches of a training.

    Args:
        config: the training.
        images: its images.
        world: the processes.
        side: of the views, as `Loader` takes it.
        global_batch_size: another one than the training's; 0: the training's.
        on_bad_images: as `Loader` takes it.
        bad_images: as `Loader` takes it.
        on_gpu_failure: as `Loader` takes it.

    """
    return Loader(
        images,
        limits=config.view_limits(),
        settings=augmentation_settings(
            center=MODES[config.mode].center,
            scale=config.crop_scale,
            ratio=config.crop_ratio,
            flip_prob=config.flip_prob,
            jitter=config.jitter,
            lighting_std=config.lighting,
        ),
        side=side,
        largest_side=config.side,
        global_batch_size=global_batch_size or config.global_batch_size,
        key=pack_key(TRAINING, config.seed),
        train=True,
        rank=world.rank,
        world_size=world.world_size,
        threads=config.workers or None,
        device=world.device,
        placement=placement_of(config, world, exact=config.deterministic),
        on_bad_images=on_bad_images,
        bad_images=bad_images,
        on_gpu_failure=on_gpu_failure,
    )
