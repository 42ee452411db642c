"""The stream is a pure function: the bytes of a view depend only on (seed, epoch, index)."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
from collections.abc import Iterable
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import (
    EVALUATION,
    TRAINING,
    Augmentation,
    Views,
    draw_matrices,
    epoch_order,
    pack_key,
)
from fast_spatial.pipelines.dataset import ImageIndex, check_divides, read_index
from fast_spatial.pipelines.digits import export_digits
from fast_spatial.pipelines.loader import Batch, Loader
from fast_spatial.pipelines.sampler import BatchSampler, Shard

IMAGES, SIDE = 200, 32
VIEWS = Views(10, SpatialLimits(30, 3 / 28))
TRAINED = Augmentation(center=False, flip_prob=0.5, jitter=(0.1, 0.1, 0.1), lighting_std=0.05)
EVALUATED = Augmentation(center=True)
RANK_BATCH = 12


class Seen(NamedTuple):
    """One image from a Loader: its position in the split, and a digest of its label and views."""

    position: int
    digest: str


def some_images(split: str) -> ImageIndex:
    return read_index(export_digits(), split).random_subset(IMAGES)


def make_loader(
    global_batch_size: int,
    *,
    train: bool = True,
    seed: int = 0,
    shard: Shard = Shard(),  # noqa: B008  (immutable)
    order: NDArray[np.int64] | None = None,
    **options: Any,
) -> Loader:
    images = some_images("train" if train else "val")
    return Loader(
        BatchSampler(images, global_batch_size=global_batch_size, seed=seed, train=train, shard=shard, order=order),
        augmentation=TRAINED if train else EVALUATED,
        views=VIEWS,
        **{"side": SIDE, **options},
    )


def seen(batches: Iterable[Batch]) -> list[Seen]:
    out = []
    for batch in batches:
        assert batch.views.shape == (len(batch.index), len(VIEWS), SIDE, SIDE, 3)
        assert batch.views.dtype == torch.uint8
        for views, label, index in zip(batch.views.numpy(), batch.labels.tolist(), batch.index.tolist()):
            out.append(Seen(index, hashlib.sha256(views.tobytes() + bytes([label])).hexdigest()))
    return out


@pytest.fixture(scope="module")
def loader() -> Loader:
    """A Loader shared by the tests of this file; each leaves it at another position."""
    return make_loader(7)


@pytest.fixture(scope="module")
def epochs() -> dict[int, list[Seen]]:
    """Epochs 0 to 2, each from a separate Loader."""
    return {epoch: seen(make_loader(7).epoch(epoch)) for epoch in range(3)}


def test_the_loader_reads_ahead(loader):
    """The Loader prefetches batches: otherwise the other tests would prove less."""
    next(loader.epoch(0))
    assert loader._next_ticket > loader._delivered + 2


def test_training_sees_the_epochs_order_but_for_the_remainder(epochs):
    for epoch, images in epochs.items():
        order = epoch_order(pack_key(TRAINING, 0), epoch, IMAGES)
        assert [image.position for image in images] == order[: IMAGES - IMAGES % 7].tolist()


def test_views_differ_between_images_epochs_and_seeds(epochs):
    other_seed = seen(make_loader(7, seed=1).epoch(0))
    everything = [*chain(*epochs.values()), *other_seed]
    assert len({image.digest for image in everything}) == len(everything)


@pytest.mark.parametrize(("global_batch_size", "threads"), [(1, 1), (7, 1), (64, 2), (200, 2)])
def test_batch_size_and_threads_change_no_byte(epochs, global_batch_size, threads):
    expected = dict(epochs[1])
    got = seen(make_loader(global_batch_size, threads=threads).epoch(1))
    assert len(got) == IMAGES - IMAGES % global_batch_size
    common = [image for image in got if image.position in expected]
    assert len(common) >= 190
    assert all(image.digest == expected[image.position] for image in common)


def test_a_loader_runs_on_across_the_end_of_an_epoch(loader, epochs):
    for epoch in (0, 1, 2):
        assert seen(loader.epoch(epoch)) == epochs[epoch]


def test_a_new_loader_resumes_in_the_middle_of_an_epoch(epochs):
    assert seen(make_loader(7).epoch(1, start_step=10)) == epochs[1][70:]


@pytest.mark.parametrize(
    "visits",
    [
        [(2, 20, 6), (0, 3, 9)],  # back by epochs
        [(1, 10, 4), (1, 9, 4), (1, 13, 2)],  # back by a few steps, then to where the Loader has read ahead to
        [(1, 10, 2), (1, 13, 5), (1, 18, 3)],  # forward into what is in flight
        [(0, 27, 1), (1, 0, 3), (0, 26, 2), (1, 0, 2)],  # about an epoch's end
        [(1, 5, 2), (1, 5, 2), (1, 5, 2)],  # the same again
    ],
)
def test_jumps_give_what_an_undisturbed_run_gives(loader, epochs, visits):
    for epoch, step, steps in visits:
        got = seen(islice(loader.epoch(epoch, start_step=step), steps))
        assert got == epochs[epoch][7 * step : 7 * (step + steps)]


def test_batches_that_are_kept_are_not_overwritten(loader, epochs):
    kept, copies = [], []
    batches = loader.epoch(0)
    for batch in islice(batches, 10):
        kept.append(batch)
        copies.append((batch.views.clone(), batch.labels.clone(), batch.index.clone()))
    for _ in batches:
        pass
    for batch, (views, labels, index) in zip(kept, copies):
        assert torch.equal(batch.views, views)
        assert torch.equal(batch.labels, labels)
        assert torch.equal(batch.index, index)
    assert seen(kept) == epochs[0][:70]


def test_labels_are_the_folders_of_the_files(loader):
    images = some_images("train")
    labels: dict[int, int] = {}
    for batch in loader.epoch(0):
        labels.update(zip(batch.index.tolist(), batch.labels.tolist()))
    assert len(labels) == 196 and set(labels.values()) == set(range(10))
    for index, label in labels.items():
        assert Path(images.path(index)).parent.name == str(label)


@pytest.mark.parametrize("train", [True, False])
def test_views_are_the_drawn_warps_of_the_untouched_view(train):
    """Includes flip and colours, which view 0 also has."""
    from tests.kernels.test_warp import bilinear  # not for the ranks' processes

    key, epoch = (pack_key(TRAINING, 0), 2) if train else (pack_key(EVALUATION, 0), 0)
    batch = next(make_loader(20, train=train).epoch(epoch))
    matrices = draw_matrices(key, epoch, batch.index.numpy(), VIEWS, SIDE).astype(np.float64)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    for views, rows in zip(batch.views.numpy(), matrices):
        for view, row in zip(views, rows):
            source_x, source_y = (a * x + b * y + c for a, b, c in row)
            assert np.abs(view - bilinear(views[0], source_x, source_y)).max() <= 0.6
        assert len({view.tobytes() for view in views}) == len(VIEWS)


# Sides that grow


def side_of(epoch: int, step: int) -> int:
    """16 px for 30 steps, more than an epoch's 28; then 32 for 30, and 48."""
    return 16 + 16 * min(2, (28 * epoch + step) // 30)


def raw(batches: Iterable[Batch]) -> list[tuple[tuple[int, ...], bytes]]:
    return [(tuple(batch.views.shape), batch.views.numpy().tobytes()) for batch in batches]


def test_the_side_is_a_function_of_the_position_and_bytes_are_those_of_that_side():
    growing = make_loader(7, side=side_of, largest_side=48)
    found = raw(chain(growing.epoch(0), growing.epoch(1), growing.epoch(2)))
    expected = []
    for side in (16, 32, 48):
        loader = make_loader(7, side=side)
        everything = chain(*(loader.epoch(epoch) for epoch in range(3)))
        last = 84 if side == 48 else 30 * (side // 16)
        expected += raw(islice(everything, 30 * (side // 16 - 1), last))
    assert [shape[2] for shape, _ in found] == [16] * 30 + [32] * 30 + [48] * 24
    assert found == expected


def test_jumps_and_resuming_find_the_side_of_their_position():
    growing = make_loader(7, side=side_of, largest_side=48)
    first, second = raw(growing.epoch(0)), raw(growing.epoch(1))
    # Back from 32 px to 16, while batches of another size are in flight, and on across the change.
    assert raw(islice(growing.epoch(0, start_step=20), 3)) == first[20:23]
    assert raw(islice(growing.epoch(1, start_step=1), 3)) == second[1:4]
    resumed = make_loader(7, side=side_of, largest_side=48)
    assert raw(resumed.epoch(1, start_step=1)) == second[1:]


# Ranks


def report_of_a_process(process: int) -> dict[str, Any]:
    """The output of the Loaders of rank `process`, in worlds of 1, 2 and 3, in this process."""
    report: dict[str, Any] = {"pid": os.getpid()}
    for world_size in range(process + 1, 4):
        options: dict[str, Any] = {"shard": Shard(process, world_size), "threads": 1}
        train = make_loader(RANK_BATCH, **options)
        report[f"train{world_size}"] = [seen([batch]) for batch in chain(train.epoch(0), train.epoch(1, start_step=5))]
        report[f"evaluate{world_size}"] = seen(make_loader(RANK_BATCH, train=False, **options).epoch(0))
    return report


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    """The reports of ranks 0 to 2, each from a separate process."""
    export_digits()  # before they all ask for it
    context = multiprocessing.get_context("forkserver")  # each forked from a process that has only imported this file
    context.set_forkserver_preload([__name__])
    with contextlib.ExitStack() as stack:
        pools = [stack.enter_context(context.Pool(1)) for _ in range(3)]
        results = [pool.apply_async(report_of_a_process, (process,)) for process, pool in enumerate(pools)]
        return [result.get(timeout=900) for result in results]


def test_ranks_are_processes(reports):
    assert len({report["pid"] for report in reports} | {os.getpid()}) == 4


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_in_their_processes_train_on_the_slices_of_one_stream(reports, epochs, world_size):
    everyone = [report[f"train{world_size}"] for report in reports[:world_size]]
    steps = IMAGES // RANK_BATCH
    assert [len(rank) for rank in everyone] == [steps + steps - 5] * world_size
    assert {len(batch) for rank in everyone for batch in rank} == {RANK_BATCH // world_size}
    stream = [image for batches in zip(*everyone) for batch in batches for image in batch]
    first, second = stream[: steps * RANK_BATCH], stream[steps * RANK_BATCH :]
    assert first == epochs[0][: steps * RANK_BATCH]
    assert second == epochs[1][5 * RANK_BATCH : steps * RANK_BATCH]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_in_their_processes_evaluate_every_image_once(reports, evaluation, world_size):
    everyone = [image for report in reports[:world_size] for image in report[f"evaluate{world_size}"]]
    assert sorted(everyone) == evaluation


# Evaluation


@pytest.fixture(scope="module")
def evaluation() -> list[Seen]:
    """The evaluation of one Loader, by index."""
    images = seen(make_loader(25, train=False).epoch(0))
    assert [image.position for image in images] == list(range(IMAGES))
    return images


@pytest.mark.parametrize(
    ("global_batch_size", "world_size"),
    [(1, 1), (7, 1), (64, 1), (300, 1), (64, 2), (50, 2), (12, 3), (48, 3), (201, 3), (300, 3), (600, 3)],
)
def test_evaluation_covers_every_image_once_whatever_the_batch(evaluation, global_batch_size, world_size):
    everyone = [
        image
        for rank in range(world_size)
        for image in seen(make_loader(global_batch_size, train=False, shard=Shard(rank, world_size)).epoch(0))
    ]
    assert len(everyone) == IMAGES
    assert sorted(everyone) == evaluation


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_in_an_order_of_its_own_sees_the_same_bytes(evaluation, world_size):
    order = np.random.default_rng(0).permutation(IMAGES)[:93]
    ranks = [
        make_loader(14, train=False, order=order, shard=Shard(rank, world_size)).epoch(0) for rank in range(world_size)
    ]
    found = [[seen([batch]) for batch in batches] for batches in ranks]
    got = [image for batches in zip_longest(*found, fillvalue=[]) for batch in batches for image in batch]
    assert got == [evaluation[position] for position in order]
    assert [len(batches) for batches in found] == [7] * world_size


def test_evaluation_draws_do_not_depend_on_the_epoch(evaluation):
    loader = make_loader(64, train=False)
    for epoch in (3, 0, 1):
        assert seen(loader.epoch(epoch)) == evaluation


def test_evaluation_draws_depend_on_the_key_alone(evaluation):
    other = seen(make_loader(64, train=False, seed=1).epoch(0))
    assert all(one.digest != another.digest for one, another in zip(evaluation, other))


# What is refused


@pytest.mark.parametrize(
    ("global_batch_size", "world_size", "processes", "batch"),
    [(256, 3, 2, 258), (256, 7, 4, 259), (10, 4, 2, 12), (7, 2, 1, 8), (2, 8, 2, 8)],
)
def test_an_uneven_batch_is_refused_with_the_nearest_that_divides(global_batch_size, world_size, processes, batch):
    with pytest.raises(UserError, match=f"use {processes} process(es)?, or --global-batch-size {batch}$") as error:
        check_divides(global_batch_size, world_size)
    assert f"--global-batch-size {global_batch_size}: not divisible by {world_size} processes" in str(error.value)
    with pytest.raises(UserError, match="not divisible"):
        make_loader(global_batch_size, shard=Shard(0, world_size))
    check_divides(global_batch_size, processes)
    check_divides(batch, world_size)


def test_a_split_smaller_than_a_batch_is_refused_for_training_only():
    with pytest.raises(UserError, match=r"train contains 200 images, less than one global batch of 201"):
        make_loader(201)
    make_loader(201, train=False)
