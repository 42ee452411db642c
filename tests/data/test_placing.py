"""The placement for --decode and --warp, and the combinations that are refused before a run starts."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch

from fast_spatial import preflight
from fast_spatial.config.commands import EvaluateConfig, LandscapeConfig, ReproduceConfig
from fast_spatial.config.fields import identity
from fast_spatial.config.train import LaunchOptions, TrainConfig
from fast_spatial.data.placing import choose_placement, placement_of
from fast_spatial.errors import UserError
from fast_spatial.kernels.crops import Crops
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.pipelines.dataset import read_index
from fast_spatial.pipelines.digits import export_digits
from fast_spatial.pipelines.inspection.probe import Choice
from fast_spatial.pipelines.loader import Loader
from fast_spatial.pipelines.placement import HW_DECODER_LOAD, Decoding, Placement, usual_placement
from fast_spatial.pipelines.sampler import BatchSampler
from fast_spatial.preflight import check_launch
from fast_spatial.runtime.distributed import World

FASTEST = Decoding("gpu", HW_DECODER_LOAD)


@pytest.mark.parametrize(
    ("decode", "warp", "found", "expected"),
    [
        ("auto", "auto", None, Placement(FASTEST, "dali")),
        ("auto", "triton", None, Placement(FASTEST, "triton")),
        ("auto", "auto", Decoding("gpu-full"), Placement(Decoding("gpu-full"), "dali")),
        ("auto", "triton", Decoding("cpu"), Placement(Decoding("cpu"), "triton")),
        ("gpu", "auto", Decoding("gpu"), Placement(Decoding("gpu"), "dali")),
        ("gpu", "auto", Decoding("cpu"), Placement(FASTEST, "dali")),
        ("gpu-full", "dali", FASTEST, Placement(Decoding("gpu-full"), "dali")),
        ("cpu", "auto", FASTEST, Placement(Decoding("cpu"), "dali")),
        ("auto", "numba", FASTEST, Placement(Decoding("cpu"), "numba")),
    ],
)
def test_a_gpu_decodes_and_warps_as_was_asked_and_found(decode, warp, found, expected):
    assert choose_placement(decode, warp, on_gpu=True, exact=False, decoding=found) == expected
    exact = choose_placement(decode, warp, on_gpu=True, exact=True, decoding=found)
    assert exact.decoding == Decoding(expected.decoding.on, 0.0)


@pytest.mark.parametrize("decode", ["auto", "cpu"])
@pytest.mark.parametrize(("warp", "by"), [("auto", "numba"), ("numba", "numba"), ("dali", "dali")])
def test_without_a_gpu_all_is_done_by_the_cpu(decode, warp, by):
    assert choose_placement(decode, warp, on_gpu=False, exact=False) == Placement(Decoding("cpu"), by)


@pytest.mark.parametrize(
    ("options", "on_gpu", "words"),
    [
        ({"decode": "gpu"}, False, ["--decode gpu: no GPU", "--decode cpu"]),
        ({"decode": "gpu-full"}, False, ["--decode gpu-full: no GPU", "--decode cpu"]),
        ({"warp": "triton"}, False, ["--warp triton: no GPU", "remove --warp"]),
        ({"warp": "numba", "decode": "gpu"}, True, ["--warp numba", "--decode cpu"]),
        ({"warp": "numba", "decode": "gpu-full"}, True, ["--warp numba", "--decode cpu"]),
    ],
)
def test_what_cannot_work_is_refused_in_two_lines(monkeypatch, options, on_gpu, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(preflight, "gpu_count", lambda: int(on_gpu))
    monkeypatch.setattr(preflight, "has_compiler", lambda name: True)
    with pytest.raises(UserError, match=words[0]) as refused:
        check_launch(LaunchOptions(**options))
    _, second = str(refused.value).splitlines()
    assert words[1] in second


def test_triton_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="package triton is not installed\ninstall it"):
        choose_placement("auto", "triton", on_gpu=True, exact=False)


def test_tests_may_interpret_triton_without_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_placement("auto", "triton", on_gpu=False, exact=True) == Placement(Decoding("cpu"), "triton")


@pytest.mark.parametrize("kind", [TrainConfig, EvaluateConfig, LandscapeConfig, ReproduceConfig])
def test_every_task_takes_both_options(kind):
    fields = {f.name: f for f in dataclasses.fields(kind)}
    assert fields["decode"].metadata["choices"] == ("auto", "gpu", "gpu-full", "cpu")
    assert fields["warp"].metadata["choices"] == ("auto", "dali", "triton", "numba")


def test_a_run_may_go_on_elsewhere():
    one = TrainConfig(data="d", mode="worst10", out="o", decode="gpu", warp="triton")
    assert identity(one) == identity(dataclasses.replace(one, decode="cpu", warp="dali"))


@pytest.mark.parametrize("wrong", [{"decode": "engine"}, {"warp": "cuda"}])
def test_other_values_are_refused(wrong):
    with pytest.raises(UserError, match="choose one of auto"):
        EvaluateConfig(checkpoint="c", data="d", **wrong)


def test_a_process_places_its_stages_by_what_was_found_on_its_device():
    world = World(0, 0, 1, torch.device("cuda", 0), decoding=Choice(Decoding("gpu-full"), "probed"))
    assert placement_of(LaunchOptions(), world, exact=True) == Placement(Decoding("gpu-full"), "dali")
    alone = World(0, 0, 1, torch.device("cpu"))
    assert placement_of(LaunchOptions(), alone, exact=True) == usual_placement(on_gpu=False)


def loader(placement: Placement | None = None) -> Loader:
    return Loader(
        BatchSampler(read_index(export_digits(), "train"), global_batch_size=4, seed=0, train=True),
        augmentation=Augmentation(center=True),
        views=Views(10, SpatialLimits(30, 0.1)),
        side=32,
        placement=placement,
    )


def test_a_loader_without_a_gpu_refuses_to_decode_on_one():
    with pytest.raises(ValueError, match="images for cpu cannot be decoded on the GPU"):
        loader(placement=Placement(Decoding("gpu"), "dali"))


@pytest.mark.parametrize(("queue_bytes", "ahead"), [(1, 2), (3 * 4 * 11 * 32 * 32 * 3, 3), (1 << 40, 4)])
def test_a_batch_is_made_while_another_one_is_used_however_large_it_is(monkeypatch, queue_bytes, ahead):
    monkeypatch.setattr("fast_spatial.pipelines.loader._QUEUE_BYTES", queue_bytes)
    batches = loader()
    next(batches.epoch(0))
    assert batches._next_ticket - batches._delivered > 1
    assert batches._ahead == ahead


def test_crops_take_less_of_the_queue_than_views(monkeypatch):
    monkeypatch.setattr("fast_spatial.pipelines.loader._QUEUE_BYTES", 4 * 4 * 32 * 32 * 3)
    assert loader(placement=Placement(Decoding("cpu"), "triton"))._ahead == 4
    assert loader()._ahead == 2


@pytest.mark.parametrize("warp", ["dali", "triton"])
def test_draws_do_not_hang_on_the_placement(warp):
    """The identity view of a centre crop is the same crop, within the resize's rounding."""
    pytest.importorskip("triton")
    usual = next(loader().epoch(0))
    batch = next(loader(placement=Placement(Decoding("cpu"), warp)).epoch(0))
    assert torch.equal(batch.index, usual.index) and torch.equal(batch.labels, usual.labels)
    made = batch.made.images if isinstance(batch.made, Crops) else batch.made[:, 0]
    untouched = made.numpy().astype(np.int64)
    assert np.abs(untouched - usual.views[:, 0].numpy()).max() <= (2 if warp == "dali" else 0)
