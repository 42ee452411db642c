"""What only a GPU can show; run by `make test-gpu`."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from fast_spatial.evaluation.evaluate import evaluate
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward
from fast_spatial.evaluation.fused import ConvReLU, MaxPool, Zeros, blocks_of
from fast_spatial.kernels.crops import Crops
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.kernels.spatial import matrices
from fast_spatial.kernels.warp import warp, warp_normalized, warp_reference
from fast_spatial.models import classifier, surgery
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.dataset import read_index
from fast_spatial.pipelines.digits import export_digits
from fast_spatial.pipelines.loader import Batch, Loader
from fast_spatial.pipelines.placement import Decoding, Placement
from fast_spatial.pipelines.sampler import BatchSampler
from fast_spatial.runtime import distributed
from fast_spatial.runtime.waiting import StreamClock
from fast_spatial.training.step import TrainStep

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
    colour = (torch.eye(3, 4) * 0.9).expand(len(images), 3, 4).clone()
    colour[:, :, 3] = 0.013  # or tenths of colours would be ties, which float32 and float64 round differently
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
        model = Classifier(classifier.build("resnet18", 10)).to(CUDA)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        step = TrainStep(model, optimizer, dtype=torch.bfloat16, scored=True, views_per_forward=16, compiled=compiled)
        losses.append([step(Batch(views, labels, torch.arange(8))).loss.mean().item() for _ in range(10)])
    assert losses[1][-1] < 0.7 * losses[1][0]
    assert abs(losses[0][0] - losses[1][0]) < 0.02 * losses[0][0]


def test_passes_that_run_out_of_gpu_memory_are_halved():
    model = Classifier(classifier.build("resnet18", 10)).to(CUDA)
    views = torch.zeros(1, 1, 224, 224, 3, dtype=torch.uint8, device=CUDA).expand(2000, 1, -1, -1, -1)
    passes = BatchedForward(FoldedJudge(model, torch.float32), 0)
    torch.cuda.empty_cache()
    # The first convolution alone writes 6.4 GB.
    torch.cuda.set_per_process_memory_fraction((6 << 30) / torch.cuda.get_device_properties(CUDA).total_memory)
    try:
        assert passes(views).shape == (2000, 1, 10)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 0 < passes.size < 2000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_views_than_one_activation_may_hold_are_judged_as_in_small_passes(dtype):
    """2,816 views of 224 px would make an activation of 2.26e9 elements in one pass."""
    torch.manual_seed(0)
    scorer = FoldedJudge(Classifier(classifier.build("resnet18", 10)).to(CUDA), dtype)
    few = torch.randint(0, 256, (16, 11, 224, 224, 3), dtype=torch.uint8, device=CUDA)
    expected = BatchedForward(scorer, 88)(few)
    found = BatchedForward(scorer, 0)(few.repeat(16, 1, 1, 1, 1))
    error = (found - expected.repeat(16, 1, 1)).abs().max() / expected.abs().max()
    assert error < (0.02 if dtype == torch.bfloat16 else 2e-3), error


@pytest.fixture
def nccl_group_of_one():
    import torch.distributed as dist

    dist.init_process_group(
        "cpu:gloo,cuda:nccl", world_size=1, rank=0, store=torch._C._distributed_c10d.HashStore(), device_id=CUDA
    )
    yield
    distributed.stop()


@pytest.mark.parametrize("compiled", [False, True])
def test_nccl_and_ddp_in_a_group_of_one_step_as_a_process_alone(nccl_group_of_one, compiled):
    grouped = losses_of_steps(compiled)
    distributed.stop()
    alone = losses_of_steps(compiled)
    assert grouped == pytest.approx(alone, rel=0.05)
    assert grouped[-1] < grouped[0]


def losses_of_steps(compiled: bool) -> list[float]:
    torch.manual_seed(0)
    model = Classifier(classifier.build("resnet18", 10)).to(CUDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    step = TrainStep(model, optimizer, dtype=torch.bfloat16, scored=True, grad_accum_steps=2, compiled=compiled)
    views = torch.randint(0, 256, (16, 3, 64, 64, 3), dtype=torch.uint8, device=CUDA)
    labels = torch.arange(16, device=CUDA) % 10
    return [step(Batch(views, labels, torch.arange(16))).loss.mean().item() for _ in range(5)]


def test_nccl_collectives_of_one_give_back_what_they_got(nccl_group_of_one):
    value = torch.tensor([3.0, 4.0], device=CUDA)
    assert distributed.all_reduce_sum(value.clone()).tolist() == [3.0, 4.0]
    assert distributed.all_reduce_min(value.clone()).tolist() == [3.0, 4.0]
    assert distributed.broadcast(7, CUDA) == 7
    assert distributed.all_equal(7, CUDA)
    assert distributed.gather("word") == ["word"]
    distributed.barrier()
    ballot = distributed.StepAgreement(2)
    assert ballot(0, 5) == [0, 0]
    assert ballot(1, 0) == [0, 5]
    assert ballot.outstanding() == [1, 0]
    norm = torch.nn.BatchNorm2d(3).to(CUDA)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    distributed.average_buffers(norm)
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


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
            BatchSampler(index, global_batch_size=32, seed=0, train=True),
            augmentation=Augmentation(center, flip_prob=0.5, jitter=(0.1, 0.1, 0.1), lighting_std=0.05),
            views=Views(3, LIMITS),
            side=64,
            device=device,
            placement=placed,
        )
        batches.append([*loader.epoch(0), *loader.epoch(1)])
    for cpu, gpu in zip(*batches):
        assert gpu.views.device.type == "cuda"
        assert torch.equal(cpu.index, gpu.index)
        assert torch.equal(cpu.labels, gpu.labels.cpu())
        difference = (cpu.views.float() - gpu.views.cpu().float()).abs()
        # Their decoders and resizes round differently; at sharp edges of the warp a few pixels differ by more.
        assert difference.mean() < 0.5, difference.mean()
        assert (difference > 16).double().mean() <= 1e-3, (difference.max(), (difference > 16).double().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_steps_lower_the_loss_in_every_dtype(dtype, grad_accum_steps):
    torch.manual_seed(0)
    model = Classifier(classifier.build("resnet18", 10)).to(CUDA)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, fused=True)
    step = TrainStep(model, optimizer, dtype=dtype, scored=True, grad_accum_steps=grad_accum_steps)
    views = torch.randint(0, 256, (16, 3, 64, 64, 3), dtype=torch.uint8, device=CUDA)
    labels = torch.arange(16, device=CUDA) % 10
    losses = [step(Batch(views, labels, torch.arange(16))).loss.mean().item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    flat = views.view(-1, 64, 64, 3)
    with torch.no_grad():
        exact = model.eval()(flat.permute(0, 3, 1, 2).float() / 255)
    assert (FoldedJudge(model, dtype)(flat) - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("views", [1, 11])
def test_steps_on_crops_are_the_steps_on_their_views(dtype, views):
    torch.manual_seed(0)
    models_of = [Classifier(classifier.build("resnet18", 10)).to(CUDA)]
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
    assert on_gpu.natural_top1_pct == on_cpu.natural_top1_pct == 100
    # Warped pixels that are rounded to the other side may decide one image.
    for name in ("random_top1_pct", "worst10_top1_pct", "grid_top1_pct"):
        assert abs(getattr(on_gpu, name) - getattr(on_cpu, name)) <= 100 / len(images) + 0.01, name


@pytest.mark.parametrize("shape", [(3, 64, 7, 2, 224), (64, 64, 3, 1, 56), (64, 128, 3, 2, 56), (512, 512, 3, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", [False, True])
def test_fused_convolutions_read_nothing_that_nobody_wrote(monkeypatch, shape, dtype, chosen):
    """Memory that comes back from the allocator is full of what is not a number."""
    channels, made, kernel, stride, side = shape
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", chosen)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(channels, made, kernel, stride, kernel // 2).to(CUDA, dtype)
    x = torch.randn(64, channels, side, side, device=CUDA, dtype=dtype).to(memory_format=torch.channels_last)
    bias = conv.bias
    assert bias is not None
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    fused = ConvReLU(conv, Zeros())
    with torch.no_grad():
        convolved = torch.nn.functional.conv2d(x.float(), conv.weight.float(), bias.float(), stride, kernel // 2)
        for shortcut in (None, torch.randn_like(convolved).to(dtype)):
            right = (convolved if shortcut is None else convolved + shortcut.float()).relu()
            poison = [torch.full_like(right, float("nan"), dtype=dtype) for _ in range(4)]
            del poison
            found = fused(x, shortcut).float()
            assert found.isfinite().all()
            assert (found - right).abs().max() < 0.02 * right.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(3, 64, 112, 112), (2, 5, 9, 13), (2, 200, 12, 40)])
def test_max_pooling_without_indices_is_max_pooling(size, dtype):
    torch.manual_seed(0)
    x = torch.randn(size, device=CUDA).to(dtype).contiguous(memory_format=torch.channels_last)
    x[0, 0, 3, 3], x[0, 1] = float("nan"), float("-inf")
    pool = torch.nn.MaxPool2d(3, 2, 1)
    torch.testing.assert_close(MaxPool(pool)(x), pool(x), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("side", "blurred", "fused"), [(64, False, 17), (65, False, 17), (64, True, 14)])
def test_a_rewritten_twin_judges_as_the_model(side, blurred, fused):
    torch.manual_seed(0)
    net = classifier.build("resnet18", 10)
    if blurred:
        surgery.blur_before_strides(net)
    model = Classifier(net).to(CUDA)
    views = torch.randint(0, 256, (16, side, side, 3), dtype=torch.uint8, device=CUDA)
    scorer = FoldedJudge(model, torch.bfloat16)
    assert scorer._twin is not None
    kinds = [type(module) for module in scorer._twin.modules()]
    assert kinds.count(ConvReLU) == fused and kinds.count(MaxPool) == 1
    assert any(node.target is blocks_of for node in scorer._twin.graph.nodes)
    exact = FoldedJudge(model, torch.float32)(views)
    assert (scorer(views) - exact).abs().max() < 0.03 * exact.abs().max()


def test_the_wait_for_data_is_the_stream_s():
    side, clock = torch.cuda.Stream(CUDA), StreamClock(CUDA)
    stream, second = torch.cuda.current_stream(CUDA), 1_000_000_000  # cycles, at least half a second
    torch.cuda._sleep(8 * second)  # a step, far longer than the data and a busy host take
    clock.start()
    with torch.cuda.stream(side):
        torch.cuda._sleep(second // 10)
        ready = side.record_event()
    ready.synchronize()  # the host waits
    stream.wait_event(ready)
    clock.stop()
    torch.cuda.synchronize(CUDA)
    assert clock.seconds < 0.02
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record(stream)
    clock.start()
    with torch.cuda.stream(side):
        torch.cuda._sleep(4 * second)
        ready = side.record_event()
    stream.wait_event(ready)
    clock.stop()
    assert clock.seconds < 0.02  # nothing waits for the end
    ended.record(stream)
    torch.cuda.synchronize(CUDA)
    assert 0.5 * begun.elapsed_time(ended) < 1000 * clock.seconds <= begun.elapsed_time(ended)
