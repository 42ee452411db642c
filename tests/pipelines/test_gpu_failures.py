"""If a GPU fails to decode, the CPU decodes the batch; only files that the CPU cannot decode count as bad."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fast_spatial.kernels.layout import Header
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.pipelines import gpu_failures, graph
from fast_spatial.pipelines.dataset import ImageIndex, read_index
from fast_spatial.pipelines.digits import export_digits
from fast_spatial.pipelines.gpu_failures import MOST_GPU_FAILURES
from fast_spatial.pipelines.loader import Batch, Loader
from fast_spatial.pipelines.placement import Decoding, Placement
from fast_spatial.pipelines.sampler import BatchSampler

IMAGES, SIDE, BATCH = 64, 32, 8
ON_GPU, ON_CPU = Placement(Decoding("gpu"), "dali"), Placement(Decoding("cpu"), "dali")
ERROR = (
    "Error in MIXED operator\nencountered:\n\nnvImageCodec failure: '#8'\nCurrent pipeline object is no longer valid"
)


class StandIn:
    """A stand-in for a GPU pipeline, on the CPU; it fails on some positions and is dead from then on."""

    def __init__(self, pipeline: Any, fails_on: set[int]) -> None:
        self._pipeline, self._fails_on, self._dead = pipeline, fails_on, False

    def run(self, *words: Any) -> Any:
        outputs = self._pipeline.run(*words)
        positions = set(np.array(outputs[-1].as_tensor())[:, Header.INDEX].tolist())
        self._dead = self._dead or bool(positions & self._fails_on)
        if self._dead:
            raise RuntimeError(ERROR)
        return outputs


class Gpu:
    """The positions on which the stand-in fails, and the numbers of pipelines built for it and for the CPU."""

    def __init__(self) -> None:
        self.fails_on: set[int] = set()
        self.built = 0
        self.others: list[int] = []
        self.pipelines: weakref.WeakSet[StandIn] = weakref.WeakSet()
        self.said: list[str] = []


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    """Loaders decode on a stand-in for a GPU."""
    stand_in, real = Gpu(), graph.view_graph

    def build(source: Any, *, placement: Placement, **options: Any) -> Any:
        stand_in.others.append(len(stand_in.pipelines))
        if placement.decoding.on == "cpu":
            return real(source, placement=placement, **options)
        stand_in.built += 1
        on_cpu = real(source, placement=replace(placement, decoding=Decoding("cpu")), **options)
        pipeline = StandIn(on_cpu, stand_in.fails_on)
        stand_in.pipelines.add(pipeline)
        return pipeline

    monkeypatch.setattr(graph, "view_graph", build)
    return stand_in


@pytest.fixture(scope="module")
def images() -> ImageIndex:
    return read_index(export_digits(), "train").random_subset(IMAGES)


def loader_of(images: ImageIndex, placement: Placement, **options: Any) -> Loader:
    loader = Loader(
        BatchSampler(images, global_batch_size=BATCH, seed=5, train=True),
        augmentation=Augmentation(center=False, flip_prob=0.5),
        views=Views(2, SpatialLimits(30, 3 / 28)),
        side=SIDE,
        placement=ON_CPU,
        **options,
    )
    loader._placement = placement  # which is not to be had without a GPU
    loader._pipeline = loader._start()
    return loader


def epochs_of(loader: Loader, count: int = 2) -> list[Batch]:
    return [batch for epoch in range(count) for batch in loader.epoch(epoch)]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.views, other.views)


def test_what_a_gpu_decodes_is_left_to_it(images, gpu):
    assert_same(epochs_of(loader_of(images, ON_GPU)), epochs_of(loader_of(images, ON_CPU)))
    assert gpu.built == 1


@pytest.mark.parametrize("position", [0, 17, 63])
def test_what_a_gpu_cannot_decode_comes_from_the_cpu(images, gpu, position):
    expected = epochs_of(loader_of(images, ON_CPU))
    gpu.fails_on |= {position}

    def refuse(*_: object) -> None:
        raise AssertionError("a good file was accused")

    found = epochs_of(loader_of(images, ON_GPU, on_gpu_failure=gpu.said.append, on_bad_images=refuse))
    assert_same(found, expected)
    assert gpu.said == [
        "the GPU failed to decode good files (nvImageCodec failure: '#8'): the CPU decodes this batch"
    ] * len(gpu.said)
    assert len(gpu.said) == 2  # once an epoch
    assert gpu.built == 1 + 2


def test_an_odd_file_does_not_end_the_decoding_on_a_gpu(images, gpu):
    gpu.fails_on |= {17, 40}
    epochs = 2 * MOST_GPU_FAILURES
    loader = loader_of(images, ON_GPU, on_gpu_failure=gpu.said.append)
    found = epochs_of(loader, count=epochs)
    assert_same(found, epochs_of(loader_of(images, ON_CPU), count=epochs))
    assert len(gpu.said) > 2 * MOST_GPU_FAILURES
    assert not [line for line in gpu.said if "from now on" in line]
    assert loader._placement == ON_GPU


def test_failures_of_long_ago_do_not_count(images, gpu, monkeypatch):
    monkeypatch.setattr(gpu_failures, "GOOD_BATCHES", 3)
    loader = loader_of(images, ON_GPU, on_gpu_failure=gpu.said.append)
    for epoch in range(2 * MOST_GPU_FAILURES):  # each on another file
        gpu.fails_on.clear()
        gpu.fails_on.add(epoch)
        list(loader.epoch(epoch))
        gpu.fails_on.clear()
        list(loader.epoch(epoch))
    assert len(gpu.said) >= 2 * MOST_GPU_FAILURES
    assert loader._placement == ON_GPU


def test_a_dead_pipeline_is_dropped_before_another_is_built(images, gpu):
    gpu.fails_on |= {17}
    epochs_of(loader_of(images, ON_GPU, on_gpu_failure=gpu.said.append))
    assert gpu.built == 3
    assert not any(gpu.others)


def test_a_gpu_that_always_fails_is_not_asked_any_more(images, gpu):
    expected = epochs_of(loader_of(images, ON_CPU), count=3)
    gpu.fails_on |= set(range(IMAGES))
    found = epochs_of(loader_of(images, ON_GPU, on_gpu_failure=gpu.said.append), count=3)
    assert_same(found, expected)
    assert len(gpu.said) == MOST_GPU_FAILURES
    assert gpu.said[-1].endswith(f"this was failure {MOST_GPU_FAILURES}, so the CPU decodes all batches from now on")
    assert gpu.built == MOST_GPU_FAILURES


def test_a_file_that_the_cpu_cannot_decode_is_accused(images, gpu, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"<html>not found</html>")
    paths = np.zeros((IMAGES, max(images.paths.shape[1], len(str(bad)) + 1)), np.uint8)
    paths[:, : images.paths.shape[1]] = images.paths
    paths[5] = 0
    paths[5, : len(str(bad))] = list(str(bad).encode())
    split = ImageIndex(images.root, paths, images.labels, images.classes)
    gpu.fails_on |= {11}
    accused: dict[int, str] = {}
    loader = loader_of(
        split, ON_GPU, on_gpu_failure=gpu.said.append, on_bad_images=lambda reasons, _: accused.update(reasons)
    )
    delivered = [index for batch in epochs_of(loader) for index in batch.index.tolist()]
    assert accused.keys() == {5}
    assert "format unknown to the decoder" in accused[5]
    assert 5 not in delivered and delivered.count(11) == 2
    assert len(gpu.said) == 2


def test_an_error_that_is_not_about_decoding_stays_that(images, gpu, monkeypatch):
    loader = loader_of(images, ON_GPU, on_gpu_failure=gpu.said.append)

    class Broken:
        def run(self, *_: Any) -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(loader, "_pipeline_of", lambda *_, **__: Broken())
    loader._pipeline = Broken()
    loader._in_flight[:] = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        epochs_of(loader)
    assert gpu.said == []
