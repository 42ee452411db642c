"""Validation between epochs: one pass over the validation images, under the training attack."""

from __future__ import annotations

from collections.abc import Callable

from fast_spatial.config.train import TrainConfig
from fast_spatial.data.loading import evaluation_loader, training_views
from fast_spatial.data.placing import placement_of
from fast_spatial.evaluation.attack import verdicts
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward, FlipJudge, default_pass_size
from fast_spatial.kernels.limits import STILL
from fast_spatial.pipelines.dataset import ImageIndex
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.metrics import EachOnce, Tally
from fast_spatial.runtime.runlog import Bar, say


class Validation:
    """Judges as the mode trains: the untouched image alone, one random view, or the worst of all views.

    Args:
        config: the options of the training.
        world: the process group.
        images: the validation images.
        judge: the model's judge; refreshed before every validation.
        on_gpu_failure: callback of `Loader`.

    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        images: ImageIndex,
        judge: FoldedJudge,
        *,
        on_gpu_failure: Callable[[str], None] = say,
    ) -> None:
        self._config, self._world, self._images, self._judge = config, world, images, judge
        views, side = training_views(config), config.eval_size or config.image_size
        self._warps = 0 if config.limits == STILL else views.random
        # On GPUs, passes have the shape of the training's passes.
        size = config.views_per_forward or default_pass_size(world.device, side)
        self._passes = BatchedForward(
            FlipJudge(judge) if config.eval_flip else judge,
            size or config.global_batch_size // world.world_size * len(views),
            pad=judge.compiled,  # another shape would be compiled again
        )
        self._epochs = 0
        self._loader = evaluation_loader(
            images,
            world,
            side=side,
            batch_size_per_process=config.global_batch_size // world.world_size,
            warps=self._warps,
            limits=config.limits,
            threads=config.workers,
            placement=placement_of(config, world, exact=True),
            on_gpu_failure=on_gpu_failure,
        )

    def __call__(self, moved: Callable[[], None]) -> dict[str, float | None]:
        """Natural top-1 and top-5 accuracy and loss, and accuracy under the training attack (None without one).

        `moved` is called after every batch.

        Raises:
            RuntimeError: if not each image was judged exactly once.

        """
        self._judge.refresh()
        bar = Bar(
            self._loader.epoch(
                self._epochs
            ),  # the views are the same every time; the epoch only identifies prefetched batches
            total=self._loader.steps_per_epoch,
            images_per_batch=self._config.global_batch_size,
            title="evaluate",
            show=self._world.rank == 0,
        )
        self._epochs += 1
        tally, once = (
            Tally(self._world.device, "top1", "top5", "loss", "attacked"),
            EachOnce(len(self._images), self._world.device),
        )
        for batch in bar:
            once.add(batch.index)
            found = verdicts(self._passes(batch.views), batch.labels)
            attacked = found.random if self._warps == 1 else found.worst
            tally.add(found.natural, found.natural_top5, found.natural_loss, attacked)
            moved()
        once.check()
        means = tally.means(over_ranks=True)
        return {
            "top1_pct": 100 * means["top1"],
            "top5_pct": 100 * means["top5"],
            "loss": means["loss"],
            "attacked_top1_pct": 100 * means["attacked"] if self._warps else None,
        }
