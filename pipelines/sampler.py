"""Which images a batch holds: a pure function of (seed, epoch, step), whatever batches came before."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fast_spatial.errors import UserError
from fast_spatial.kernels.sampling import EVALUATION, TRAINING, epoch_order, pack_key
from fast_spatial.pipelines.dataset import ImageIndex, check_divides

_NONE = np.empty(0, np.int64)


class Shard(NamedTuple):
    """One of `world_size` equal slices of each global batch. `rank` is the GLOBAL rank."""

    rank: int = 0
    world_size: int = 1


class BatchSampler:
    """The positions in a split of each batch of one process.

    Step s of an epoch holds entries [s * G, (s + 1) * G) of the epoch's order, with G the global batch size. Rank r
    takes the r-th slice of them. A ticket is the number of a batch: epoch * steps_per_epoch + step.

    Args:
        images: the split.
        global_batch_size: images per step, over all ranks; the world size must divide it.
        seed: seed of the order, and of what is drawn for the images.
        train: if true, shuffle, draw anew every epoch and drop the remainder. Otherwise deliver each image once, always
            with the draws of epoch 0.
        shard: this process's slice.
        order: the positions that an evaluation visits, in order; default all. An image's draws depend on its position
            in the split, not on its place in the order.
        bad_images: positions of images of which no part can be decoded; replaced from the start.

    A bad image is replaced by the next good one of the split. Whether it is bad depends on its crop, and so on (seed,
    epoch, position) alone. The stream therefore stays a pure function of them, whenever the damage is found.

    Attributes:
        key: the generator's key (`kernels.sampling.pack_key`).
        batch_size: images per full batch of this process.
        steps_per_epoch: batches of this process in an epoch.

    Raises:
        UserError: if the world size does not divide the batch, the split is smaller than one batch, or all images are
            bad.

    """

    def __init__(
        self,
        images: ImageIndex,
        *,
        global_batch_size: int,
        seed: int,
        train: bool,
        shard: Shard = Shard(),  # noqa: B008  (immutable)
        order: NDArray[np.int64] | None = None,
        bad_images: Collection[int] = (),
    ) -> None:
        check_divides(global_batch_size, shard.world_size)
        if train and len(images) < global_batch_size:
            raise UserError(
                f"{images.root} contains {len(images)} images, less than one global batch of {global_batch_size}",
                "lower --global-batch-size",
            )
        assert not train or order is None
        self.images, self.train, self.shard = images, train, shard
        self.key = pack_key(TRAINING if train else EVALUATION, seed)
        self.batch_size = global_batch_size // shard.world_size
        self._global_batch_size = global_batch_size
        self._visited = np.arange(len(images)) if order is None else order
        self.steps_per_epoch = self._count_steps()
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._bad_images = np.array(sorted(bad_images), np.int64)
        self._damaged: dict[int, NDArray[np.int64]] = {}  # by epoch
        self._check_some_are_good()

    def batch(self, ticket: int) -> tuple[int, NDArray[np.int64]]:
        """(epoch of the draws, positions in the split, int64 [B]) of one batch."""
        epoch, positions = self._planned(ticket)
        bad = np.union1d(self._bad_images, self._damaged.get(epoch, _NONE))
        while len(bad) and (replaced := np.isin(positions, bad)).any():
            positions = np.where(replaced, (positions + 1) % len(self.images), positions)
        return epoch, positions

    def replace(self, damaged: Mapping[int, Collection[int]], hopeless: Collection[int]) -> None:
        """Replace bad images from now on.

        Args:
            damaged: epochs in which an image's crop cannot be decoded, by its position.
            hopeless: positions of images of which no part can be decoded.

        Raises:
            UserError: if all images are bad.

        """
        self._bad_images = np.union1d(self._bad_images, np.array(sorted(hopeless), np.int64))
        for position, epochs in damaged.items():
            for epoch in epochs:
                self._damaged[epoch] = np.union1d(self._damaged.get(epoch, _NONE), position)
        self._check_some_are_good()

    def _count_steps(self) -> int:
        if self.train:
            return len(self.images) // self._global_batch_size
        full, rest = divmod(len(self._visited), self._global_batch_size)
        return full + (rest > self.shard.rank * self.batch_size)

    def _planned(self, ticket: int) -> tuple[int, NDArray[np.int64]]:
        epoch, step = divmod(ticket, self.steps_per_epoch)
        begin = step * self._global_batch_size + self.shard.rank * self.batch_size
        end = begin + self.batch_size
        if not self.train:
            return 0, self._visited[begin:end]
        if epoch not in self._orders:  # reading ahead crosses the end of an epoch
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = epoch_order(self.key, epoch, len(self.images))
        return epoch, self._orders[epoch][begin:end]

    def _check_some_are_good(self) -> None:
        if len(self._bad_images) == len(self.images):
            raise UserError(
                f"{self.images.root}: none of the {len(self.images)} images can be decoded",
                f"inspect the data: launch.py check-data --data {self.images.root.parent}",
            )
