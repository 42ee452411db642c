"""The pass over all 775 views: against brute force, in one and two processes, written and read back."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy

from fast_spatial.config.commands import LandscapeConfig
from fast_spatial.errors import UserError
from fast_spatial.evaluation import landscape
from fast_spatial.evaluation.forward import BatchedForward, ModuleJudge
from fast_spatial.evaluation.landscape import judge_all_views, sample_positions
from fast_spatial.evaluation.landscape_files import Landscape, read
from fast_spatial.kernels.limits import GRID_ANGLES, GRID_SHIFTS, GRID_VIEWS, SpatialLimits
from fast_spatial.kernels.spatial import GRID_IDENTITY, grid, matrices
from fast_spatial.kernels.warp import warp
from fast_spatial.models import classifier
from fast_spatial.pipelines.dataset import read_index
from fast_spatial.pipelines.loader import Batch
from fast_spatial.runtime import distributed, run_files

LIMITS = SpatialLimits.from_px(30)
CLASSES, PER_CLASS, SIDE = ("cat", "dog", "fish"), 4, 17
ALONE = distributed.World(0, 0, 1, torch.device("cpu"))


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 5, stride=3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 5 * 5, 3)).eval()


def batches(count: int, size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    views = torch.randint(0, 256, (count, 2, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return [Batch(*part) for part in zip(views.split(size), labels.split(size), torch.arange(count).split(size))]


@pytest.mark.parametrize(("size", "judged"), [(5, 1000), (2, 64), (1, 7)])
def test_every_view_has_the_loss_and_verdict_of_brute_force(size, judged):
    judge = net()
    found = list(
        judge_all_views(
            BatchedForward(ModuleJudge(judge, torch.float32), judged, pad=True), batches(5, size), LIMITS, SIDE
        )
    )
    (whole,) = batches(5, 5)
    assert [image.index for image in found] == list(range(5))
    for view, params in enumerate(grid(LIMITS)):
        if view % 31 not in (0, 12):  # all angles and translations take their turn
            continue
        matrix_B123 = torch.from_numpy(matrices(params, SIDE)).expand(5, 1, 2, 3)
        with torch.no_grad():
            logits = judge(warp(whole.views[:, 0], matrix_B123)[:, 0].permute(0, 3, 1, 2).float() / 255)
        losses = cross_entropy(logits, whole.labels, reduction="none")
        assert [image.loss[view] for image in found] == pytest.approx(losses.tolist(), rel=2e-3, abs=1e-3)
        assert [image.correct[view] for image in found] == (logits.argmax(dim=1) == whole.labels).tolist()
    for image in found:
        assert image.loss.shape == image.correct.shape == (GRID_VIEWS,)
        assert image.loss[image.worst_view] == image.loss.max()
        assert (image.worst_predicted == whole.labels[image.index]) == image.correct[image.worst_view]
    assert len({image.worst_view for image in found}) > 1


def test_a_loss_beyond_half_precision_stays_a_number():
    class Certain(nn.Module):
        def forward(self, images):
            return torch.tensor([[0.0, 1e6, float("nan")]]).expand(len(images), 3)

    (image,) = judge_all_views(BatchedForward(ModuleJudge(Certain(), torch.float32), 0), batches(1, 1), LIMITS, SIDE)
    assert np.isfinite(image.loss).all()
    assert image.loss.max() > 60000


# --- the subset


def folder_of(root: Path, counts: dict[str, int]) -> Path:
    random = np.random.default_rng(0)
    for name, count in counts.items():
        (root / "val" / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{number}.jpg")
    return root


def test_the_subset_has_as_many_of_every_class_and_is_fixed(tmp_path):
    images = read_index(folder_of(tmp_path, {"a": 9, "b": 3, "c": 5}), "val")
    chosen = images.balanced_subset(3)
    assert np.bincount(chosen.labels).tolist() == [3, 3, 3]
    paths = [chosen.relative_path(i) for i in range(len(chosen))]
    assert paths == sorted(paths) and len(set(paths)) == 9
    assert paths == [images.balanced_subset(3).relative_path(i) for i in range(9)]
    assert paths[:3] != ["val/a/0.jpg", "val/a/1.jpg", "val/a/2.jpg"]  # drawn, not the first
    one = images.balanced_subset(1)
    assert {one.relative_path(i) for i in range(3)} < set(paths)  # a larger subset holds the smaller
    with pytest.raises(ValueError, match="holds only 3 images of class b"):
        images.balanced_subset(4)


def test_the_balanced_order_goes_round_the_classes_and_begins_with_every_subset(tmp_path):
    images = read_index(folder_of(tmp_path, {"a": 9, "b": 3, "c": 5}), "val")
    order = images.balanced_order()
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(17))
    assert images.labels[order].tolist() == [0, 1, 2] * 3 + [0, 2] * 2 + [0] * 4
    for per_class in range(4):
        assert images.balanced_positions(per_class).tolist() == order[: 3 * per_class].tolist()
    chosen = images.balanced_subset(2)
    assert [chosen.relative_path(i) for i in range(6)] == [images.relative_path(i) for i in sorted(order[:6])]


@pytest.mark.parametrize(("held", "rounds"), [(range(0), 0), (range(2), 0), (range(7), 2), (range(17), 3)])
def test_rounds_that_are_complete(tmp_path, held, rounds):
    images = read_index(folder_of(tmp_path, {"a": 9, "b": 3, "c": 5}), "val")
    order = images.balanced_order()
    assert images.balanced_rounds(order[held].tolist()) == rounds
    assert images.balanced_rounds(set(order.tolist()) - {int(order[4])}) == 1  # what comes after a gap does not count


def test_samples_are_spread_over_the_classes():
    assert sample_positions(100) == [0, 14, 28, 42, 56, 70, 84, 99]
    assert sample_positions(3) == [0, 1, 2]


# --- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(data, checkpoint): images of noise, and a network that was never trained."""
    root = folder_of(tmp_path_factory.mktemp("data"), dict.fromkeys(CLASSES, PER_CLASS))
    torch.manual_seed(0)
    net = classifier.build("squeezenet1_1", 3)
    torch.save({name: value.half().float() for name, value in net.state_dict().items()}, root / "weights.pt")
    return root, root / "weights.pt"


def config_of(trained, out: Path, **options) -> LandscapeConfig:
    data, checkpoint = trained
    shared = {"image_size": 32, "arch": "squeezenet1_1", "workers": 1}
    return LandscapeConfig(data=str(data), checkpoint=str(checkpoint), out=str(out), **{**shared, **options})


def rank_main(rank: int, port: int, config: LandscapeConfig) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    landscape.landscape(config, distributed.start(stall_minutes=2))
    distributed.stop()


def test_one_and_two_processes_see_the_same(trained, tmp_path):
    five, two = (images * GRID_VIEWS // landscape.PASSES_PER_BATCH + 1 for images in (5, 2))  # of 9 images
    landscape.landscape(config_of(trained, tmp_path / "one", images_per_class=3, views_per_forward=five), ALONE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(rank_main, (port, config_of(trained, tmp_path / "two", images_per_class=3, views_per_forward=two)), nprocs=2)
    one, both = read(tmp_path / "one"), read(tmp_path / "two")
    assert one is not None and both is not None
    np.testing.assert_allclose(one.loss, both.loss, rtol=2e-3)
    assert (one.correct == both.correct).mean() > 0.999  # another number of threads adds in another order
    assert one.loss.shape == one.correct.shape == (9, GRID_ANGLES, GRID_SHIFTS, GRID_SHIFTS)
    for about in (one.about, both.about):
        del about["config"], about["seconds"]
    assert one.about["images"] == both.about["images"]
    assert [image["class"] for image in one.about["images"]] == [name for name in CLASSES for _ in range(3)]
    assert len(one.about["samples"]) == 8
    for sample in one.about["samples"]:
        worst = one.loss[sample["image"]].reshape(-1)
        assert worst[sample["worst_view"]] == worst.max() == pytest.approx(sample["worst_loss"])
        assert worst[GRID_IDENTITY] == pytest.approx(sample["untouched_loss"])
        degrees, tx, ty = grid(LIMITS)[sample["worst_view"]] * (1, 224, 224)
        assert (sample["degrees"], sample["tx_px"], sample["ty_px"]) == pytest.approx((degrees, tx, ty), abs=1e-3)
        pictures = [np.asarray(Image.open(tmp_path / "one" / sample[kind]), float) for kind in ("untouched", "worst")]
        shown = warp(
            torch.from_numpy(pictures[0].astype(np.uint8))[None],
            torch.from_numpy(matrices(grid(LIMITS)[sample["worst_view"]], 32))[None, None],
        )
        assert np.abs(shown[0, 0].numpy() - pictures[1]).mean() < 12  # but for the JPEG


def test_views_within_limits(trained, tmp_path):
    correct = np.zeros((1, GRID_ANGLES, GRID_SHIFTS, GRID_SHIFTS), bool)
    correct[0, 14:17, 2, 2] = True
    found = Landscape(tmp_path, {"degrees": 30.0, "translate_px": 24.0}, correct.astype(np.float32), correct)
    assert found.angles_deg == pytest.approx([2 * i - 30 for i in range(31)])
    assert found.shifts_px == [-24, -12, 0, 12, 24]
    assert found.within(0, 0).tolist() == [[True]]
    assert found.within(1, 0).all() and found.within(1, 0).shape == (1, 3)
    assert found.within(2, 0).sum() == 3 and found.within(2, 0).shape == (1, 5)
    assert found.within(0, 1).shape == (1, 9) and found.within(0, 1).sum() == 1
    assert found.within(15, 2).shape == (1, GRID_VIEWS)


def test_a_damaged_landscape_is_named(tmp_path):
    assert read(tmp_path) is None
    (tmp_path / run_files.LANDSCAPE).write_text('{"num_images": 3}')
    with pytest.raises(UserError, match=r"landscape.json: it cannot be read"):
        read(tmp_path)


def test_too_many_images_per_class_are_refused(trained, tmp_path):
    with pytest.raises(UserError, match=r"^--images-per-class 5: .* holds only 4 images of class cat"):
        landscape.load_model_and_subset(config_of(trained, tmp_path, images_per_class=5))
    inputs, per_class = landscape.load_model_and_subset(config_of(trained, tmp_path))
    assert (len(inputs.images), per_class, inputs.side) == (12, 4, 32)  # all there are, if they are fewer than wanted
