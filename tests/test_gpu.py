"""What only a GPU can show; run by `make test-gpu`."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fast_spatial import model as models
from fast_spatial.evaluate import evaluate
from fast_spatial.model import Classifier
from fast_spatial.scoring import Passes, Scorer
from fast_spatial.step import TrainStep
from kernels.crops import Crops
from kernels.limits import SpatialLimits
from kernels.sampling import TRAINING, augmentation_settings, pack_key, view_limits
from kernels.spatial import matrices
from kernels.warp import warp, warp_normalized, warp_reference
from pipelines.dataset import read_index
from pipelines.digits import export_digits
from pipelines.loader import Batch, Loader
from pipelines.placement import Decoding, Placement

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CUDA = torch.device("cuda", 0)
LIMITS = SpatialLimits.from_px(40)


@pytest.fixture(scope="module")
def images_and_matrices():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (3, 97, 97, 3)).astype(np.uint8))
    params = rng.uniform(-1, 1, (3, 5, 3)) * [LIMITS.degrees, LIMITS.translate, LIMITS.translate]
    return images, torch.from_numpy(matrices(params, 97))


def test_the_gpu_warp_is_the_reference(images_and_matrices):
    images, matrices_BV23 = images_and_matrices
    colour = torch.eye(3, 4).expand(len(images), 3, 4) * 0.9
    for change in (None, colour):
        exact = warp_reference(images, matrices_BV23.double(), change)
        found = warp(images.to(CUDA), matrices_BV23.to(CUDA), None if change is None else change.to(CUDA)).cpu()
        assert (found - exact).abs().max() <= 0.52
        assert (found == exact.round()).double().mean() >= 0.98


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 2e-3)])
def test_views_are_normalized_on_the_gpu_as_on_the_cpu(images_and_matrices, dtype, error):
    images, matrices_BV23 = images_and_matrices
    model = Classifier(torch.nn.Identity())
    on_gpu = copy.deepcopy(model).to(CUDA)
    expected = model.normalize(warp(images, matrices_BV23).flatten(0, 1))
    fused = warp_normalized(images.to(CUDA), matrices_BV23.to(CUDA), on_gpu.scale, on_gpu.shift, dtype)
    cast = on_gpu.normalize(warp(images, matrices_BV23).flatten(0, 1).to(CUDA), dtype)
    for found in (fused, cast):
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
    assert (cast.cpu().float() - expected).abs().max() <= error
    # The two backends round a few pixels to either side.
    difference = (fused.cpu().float() - expected).abs()
    assert (difference <= error).double().mean() >= 0.98
    assert difference.max() <= error + 1.02 / 255 / 0.22


def test_compiled_networks_judge_and_train_as_plain_ones():
    torch.manual_seed(0)
    views = torch.randint(0, 256, (8, 3, 64, 64, 3), dtype=torch.uint8, device=CUDA)
    labels = torch.arange(8, device=CUDA)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = Classifier(models.build("resnet18", 10)).to(CUDA)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        step = TrainStep(model, optimizer, dtype=torch.bfloat16, scored=True, score_chunk=16, compiled=compiled)
        losses.append([step(Batch(views, labels, torch.arange(8))).loss.mean().item() for _ in range(10)])
    assert losses[1][-1] < 0.7 * losses[1][0]
    assert abs(losses[0][0] - losses[1][0]) < 0.02 * losses[0][0]


def test_passes_that_run_out_of_gpu_memory_are_halved():
    model = Classifier(models.build("resnet18", 10)).to(CUDA)
    scorer = Scorer(model, torch.float32)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    count = min(int(1.2 * total / (224 * 224 * 3 * 4)), 60_000)
    views = torch.zeros(1, 1, 224, 224, 3, dtype=torch.uint8, device=CUDA).expand(count, 1, -1, -1, -1)
    passes = Passes(scorer, 0)
    assert passes(views).shape == (count, 1, 10)
    assert 0 < passes.size < count


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    "placement",
    [
        *[Placement(Decoding(on), warp) for on in ("gpu", "gpu-full", "cpu") for warp in ("dali", "triton")],
        Placement(Decoding("cpu"), "numba"),
    ],
    ids=lambda p: f"{p.decoding.on}, {p.warp}",
)
def test_the_gpu_stream_has_the_draws_of_the_cpu_and_nearly_its_pixels(placement, center):
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("sklearn")
    index = read_index(export_digits(), "train").random_subset(64)
    batches = []
    for device, placed in ((torch.device("cpu"), None), (CUDA, placement)):
        loader = Loader(
            index,
            limits=view_limits(3, untouched_first=True, degrees=LIMITS.degrees, translate=LIMITS.translate),
            settings=augmentation_settings(center=center, flip_prob=0.5, jitter=(0.1, 0.1, 0.1), lighting_std=0.05),
            side=64,
            global_batch_size=32,
            key=pack_key(TRAINING, 0),
            train=True,
            device=device,
            placement=placed,
        )
        batches.append([*loader.epoch(0), *loader.epoch(1)])
    for cpu, gpu in zip(*batches):
        assert gpu.views.device.type == "cuda"
        assert torch.equal(cpu.index, gpu.index)
        assert torch.equal(cpu.labels, gpu.labels.cpu())
        difference = (cpu.views.float() - gpu.views.cpu().float()).abs()
        assert difference.mean() < 0.5
        assert difference.max() <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_lower_the_loss_in_every_dtype(dtype, accumulate):
    torch.manual_seed(0)
    model = Classifier(models.build("resnet18", 10)).to(CUDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, fused=True)
    step = TrainStep(model, optimizer, dtype=dtype, scored=True, accumulate=accumulate)
    views = torch.randint(0, 256, (16, 3, 64, 64, 3), dtype=torch.uint8, device=CUDA)
    labels = torch.arange(16, device=CUDA) % 10
    losses = [step(Batch(views, labels, torch.arange(16))).loss.mean().item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    flat = views.view(-1, 64, 64, 3)
    with torch.no_grad():
        exact = model.eval()(flat.permute(0, 3, 1, 2).float() / 255)
    assert (Scorer(model, dtype)(flat) - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("views", [1, 11])
def test_steps_on_crops_are_the_steps_on_their_views(dtype, views):
    torch.manual_seed(0)
    models_of = [Classifier(models.build("resnet18", 10)).to(CUDA)]
    models_of.append(copy.deepcopy(models_of[0]))
    steps = [TrainStep(m, torch.optim.SGD(m.parameters(), lr=0.02), dtype=dtype, scored=views > 1) for m in models_of]
    params = np.random.default_rng(0).uniform(-1, 1, (16, views, 3)) * [30, 0.1, 0.1]
    crops = Crops(
        torch.randint(0, 256, (16, 64, 64, 3), dtype=torch.uint8, device=CUDA),
        torch.from_numpy(matrices(params, 64)).to(CUDA),
        torch.tensor([1.1, 0.9, 1.05, 3.0, -2.0, 1.0], device=CUDA).repeat(16, 1),
    )
    labels, index = torch.arange(16, device=CUDA) % 10, torch.arange(16)
    ours = steps[0](Batch(crops, labels, index))
    theirs = steps[1](Batch(crops.views(), labels, index))
    assert torch.equal(ours.choice, theirs.choice)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-3, atol=1e-3)


def test_a_model_is_judged_on_the_gpu_as_on_the_cpu():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 33 * 33, 4))
    images = torch.rand(12, 3, 33, 33)
    labels = model(images).argmax(dim=1)
    on_cpu = evaluate(model, [(images, labels)])
    on_gpu = evaluate(model.to(CUDA), [(images, labels)])
    assert on_gpu == on_cpu
