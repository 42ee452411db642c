"""What only a GPU can show; run by `make test-gpu`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fast_spatial import model as models
from fast_spatial.evaluate import evaluate
from fast_spatial.model import Classifier
from fast_spatial.scoring import Scorer
from fast_spatial.step import TrainStep
from kernels.sampling import TRAINING, augmentation_settings, pack_key, view_limits
from kernels.spatial import SpatialLimits, matrices
from kernels.warp import warp, warp_reference
from pipelines.dataset import read_index
from pipelines.digits import export_digits
from pipelines.loader import Batch, Loader

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
    exact = warp_reference(images, matrices_BV23.double())
    found = warp(images.to(CUDA), matrices_BV23.to(CUDA)).cpu()
    assert (found - exact).abs().max() <= 0.6


@pytest.mark.parametrize("center", [False, True])
def test_the_gpu_stream_has_the_draws_of_the_cpu_and_nearly_its_pixels(center):
    index = read_index(export_digits(), "train").random_subset(64)
    batches = []
    for device in (torch.device("cpu"), CUDA):
        loader = Loader(
            index,
            limits=view_limits(3, untouched_first=True, degrees=LIMITS.degrees, translate=LIMITS.translate),
            settings=augmentation_settings(center=center, flip_prob=0.5, jitter=(0.1, 0.1, 0.1), lighting_std=0.05),
            side=64,
            global_batch_size=32,
            key=pack_key(TRAINING, 0),
            train=True,
            device=device,
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


def test_a_model_is_judged_on_the_gpu_as_on_the_cpu():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 33 * 33, 4))
    images = torch.rand(12, 3, 33, 33)
    labels = model(images).argmax(dim=1)
    on_cpu = evaluate(model, [(images, labels)])
    on_gpu = evaluate(model.to(CUDA), [(images, labels)])
    assert on_gpu == on_cpu
