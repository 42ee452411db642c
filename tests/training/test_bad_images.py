"""Undecodable images in training: named, or replaced by a rule that depends only on the images."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fast_spatial.config.commands import EvaluateConfig
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.evaluation.evaluate import evaluate_checkpoint
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.pipelines.dataset import ImageIndex, read_index
from fast_spatial.pipelines.digits import export_digits
from fast_spatial.pipelines.loader import Batch, Loader
from fast_spatial.pipelines.sampler import BatchSampler, Shard
from fast_spatial.runtime.distributed import World, stop
from fast_spatial.training.bad_images import BadImages
from fast_spatial.training.train import train

IMAGES, SIDE = 96, 32
GARBAGE, TRUNCATED = (3, 4, 50), (7, 20, 33, 60, 61, 80)
ALONE = World(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageIndex:
    """A split with some undecodable files (two of them neighbours), and some truncated ones."""
    root = tmp_path_factory.mktemp("data")
    source = read_index(export_digits(), "train").random_subset(IMAGES)
    for position in range(IMAGES):
        target = root / source.relative_path(position)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source.path(position), target)
    found = read_index(root, "train")
    for position in GARBAGE:
        Path(found.path(position)).write_bytes(b"<html>not found</html>")
    for position in TRUNCATED:
        content = Path(found.path(position)).read_bytes()
        Path(found.path(position)).write_bytes(content[: len(content) * 7 // 10])
    return found


class Met:
    """The bad images that a Loader reported."""

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}
        self.hopeless: set[int] = set()

    def __call__(self, reasons: dict[int, str], hopeless: Collection[int]) -> None:
        self.reasons |= reasons
        self.hopeless |= set(hopeless)


def loader_of(images: ImageIndex, batch: int, on_bad_images: Met | None = None, **options: Any) -> Loader:
    return Loader(
        BatchSampler(images, global_batch_size=batch, seed=5, train=True, **options),
        augmentation=Augmentation(center=False, flip_prob=0.5),
        views=Views(1, SpatialLimits(30, 3 / 28)),
        side=SIDE,
        on_bad_images=on_bad_images,
    )


def seen(batches: Iterable[Batch]) -> list[tuple[int, str]]:
    found = []
    for batch in batches:
        for views, index in zip(batch.views.numpy(), batch.index.tolist()):
            found.append((index, hashlib.sha256(views.tobytes()).hexdigest()))
    return found


@pytest.fixture(scope="module")
def stream(images) -> tuple[list[list[tuple[int, str]]], Met]:
    """Three epochs, from the start."""
    met = Met()
    loader = loader_of(images, 8, met)
    return [seen(loader.epoch(epoch)) for epoch in range(3)], met


def test_no_bad_image_is_delivered_and_each_is_known_for_what_it_is(stream):
    epochs, met = stream
    assert met.hopeless == set(GARBAGE)
    assert set(GARBAGE) < set(met.reasons) <= {*GARBAGE, *TRUNCATED}
    delivered = [index for epoch in epochs for index, _ in epoch]
    assert len(delivered) == 3 * IMAGES
    assert not set(GARBAGE) & set(delivered)
    # Part of a truncated image can be decoded, and some crops lie in it.
    assert set(TRUNCATED) & set(delivered)


def test_a_neighbour_takes_the_place(stream, images):
    epochs, _ = stream
    order = [index for index, _ in seen(loader_of_good(images).epoch(0))]
    for planned, delivered in zip(order, (index for index, _ in epochs[0])):
        if planned in (3, 4):
            assert delivered == 5
        elif planned not in (*GARBAGE, *TRUNCATED):
            assert delivered == planned


def loader_of_good(images: ImageIndex) -> Loader:
    """The stream of a split without bad images: every path names one good file, which does not change the order."""
    good = np.repeat(images.paths[:1], len(images), axis=0)
    return loader_of(ImageIndex(images.root, good, images.labels, images.classes), 8)


@pytest.mark.parametrize(("epoch", "step"), [(0, 4), (1, 7), (2, 0)])
def test_a_run_that_starts_elsewhere_gets_the_same_images(images, stream, epoch, step):
    epochs, _ = stream
    loader = loader_of(images, 8, Met())
    for number in range(epoch, 3):
        start = step if number == epoch else 0
        assert seen(loader.epoch(number, start)) == epochs[number][8 * start :]


def test_what_was_met_before_changes_nothing(images, stream):
    epochs, _ = stream
    loader = loader_of(images, 8, Met(), bad_images=GARBAGE)
    assert seen(loader.epoch(1)) == epochs[1]


def test_processes_need_not_tell_each_other(images, stream):
    epochs, _ = stream
    ranks = [loader_of(images, 8, Met(), shard=Shard(rank, 2)) for rank in range(2)]
    parts = [seen(loader.epoch(0)) for loader in ranks]
    together = [image for step in range(12) for part in parts for image in part[4 * step : 4 * step + 4]]
    assert together == epochs[0]


def test_without_leave_the_first_one_ends_it_with_its_name(images):
    with pytest.raises(UserError, match="cannot be decoded") as ended:
        seen(loader_of(images, 8).epoch(0))
    named = Path(str(ended.value).split(": cannot", maxsplit=1)[0].split(": part", maxsplit=1)[0])
    assert named in {Path(images.path(position)) for position in (*GARBAGE, *TRUNCATED)}
    assert "launch.py check-data --data" in str(ended.value)


def test_a_split_without_a_good_image_ends_at_once(images):
    with pytest.raises(UserError, match="none of the 96 images"):
        loader_of(images, 8, bad_images=range(IMAGES))


def test_lists_are_those_that_exclude_reads(images, tmp_path):
    bad = BadImages(tmp_path, 0, images, skip=True, at_most=3)
    bad.met({3: "it is garbage", 7: "a part is missing"}, [3])
    other = BadImages(tmp_path, 1, images, skip=True, at_most=3)
    other.met({3: "it is garbage"}, [3])
    assert other.paths() == sorted(images.relative_path(position) for position in (3, 7))
    assert other.positions() == [3]
    assert len(images.without(tmp_path / "bad_images.rank_0.txt")) == IMAGES - 1
    with pytest.raises(UserError, match="--max-bad-images 3: 4 images cannot be decoded"):
        other.met({4: "it is garbage", 20: "a part is missing"}, [4])
    with pytest.raises(UserError, match=r"has already replaced 2 undecodable images .*\nadd --on-bad-image skip"):
        BadImages(tmp_path, 0, images, skip=False, at_most=3).positions()
    with pytest.raises(UserError, match="--max-bad-images 1"):
        BadImages(tmp_path, 0, images, skip=True, at_most=1).positions()


def test_a_training_goes_on_without_them_and_an_evaluation_does_not(images, tmp_path, capfd):
    data = tmp_path / "data"
    shutil.copytree(images.root.parent, data)
    shutil.copytree(data / "train", data / "val")
    for position in (*GARBAGE, *TRUNCATED):
        (data / "val" / Path(images.relative_path(position)).relative_to("train")).unlink()
    flags: dict[str, Any] = {"data": str(data), "out": str(tmp_path / "run"), "mode": "random", "image_size": SIDE}
    flags |= {"epochs": 2, "milestones": (1,), "global_batch_size": 16, "arch": "squeezenet1_1", "lr": 0.01}
    with pytest.raises(UserError, match="--on-bad-image skip"):
        train(TrainConfig(**flags), ALONE)
    stop()
    train(TrainConfig(**flags, on_bad_image="skip"), ALONE)
    stop()
    assert "training images could not be decoded and were replaced: train/" in capfd.readouterr().out
    first = sorted((data / "val").rglob("*.jpg"))[0]
    first.write_bytes(b"")
    with pytest.raises(UserError, match=f"{first}: cannot be decoded: empty file"):
        evaluate_checkpoint(EvaluateConfig(checkpoint=str(tmp_path / "run" / "last.pt"), data=str(data)), ALONE)
    stop()
