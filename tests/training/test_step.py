"""The training step against a plain torch version of the original's step, and against golden losses."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn.functional import conv2d, cross_entropy, grid_sample
from torchvision.models.resnet import BasicBlock, ResNet

from fast_spatial.config.fields import parse
from fast_spatial.config.train import TrainConfig
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward, FlipJudge, ModuleJudge
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.spatial import matrices
from fast_spatial.kernels.warp import warp
from fast_spatial.models import classifier, surgery
from fast_spatial.models.classifier import Classifier, to_unit
from fast_spatial.pipelines.loader import Batch
from fast_spatial.training.optim import make_optimizer
from fast_spatial.training.step import TrainStep, make_step
from tests.golden import make_losses_golden as golden


def step_of(model: Classifier, *, scored: bool = True, lr: float = 0.05, **options) -> TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    return TrainStep(model, optimizer, dtype=torch.float32, scored=scored, **options)


def batch_of(views, labels) -> Batch:
    return Batch(views, labels, torch.arange(len(labels)))


def test_ten_steps_give_the_golden_losses_and_views():
    expected = json.loads((Path(golden.__file__).parent / "losses.json").read_text())
    step = step_of(Classifier(golden.tiny()))
    for number in range(golden.STEPS):
        result = step(batch_of(golden.views_of(number), golden.labels_of(number)))
        assert result.choice.tolist() == expected["choices"][number]
        assert result.loss.mean().item() == pytest.approx(expected["losses"][number], abs=2e-5)


def test_the_golden_choices_need_the_scoring():
    expected = json.loads((Path(golden.__file__).parent / "losses.json").read_text())
    chosen = {view for choice in expected["choices"] for view in choice}
    assert chosen == {0, 1, 2}


@pytest.mark.parametrize("grad_accum_steps", [2, 3])
def test_accumulation_gives_the_gradient_of_the_whole_batch(grad_accum_steps):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))  # no BatchNorm, so parts are independent
    whole, parts = Classifier(copy.deepcopy(net)), Classifier(net)
    batch = batch_of(golden.views_of(0)[:, :1], golden.labels_of(0))
    step_of(whole, scored=False)(batch)
    step_of(parts, scored=False, grad_accum_steps=grad_accum_steps)(batch)
    for one, other in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def photographs(side: int, count: int) -> torch.Tensor:
    crops = []
    for number in range(count):
        image = Image.fromarray(load_sample_images().images[number % 2])
        left, top = 61 * number % 300, 37 * number % 150
        crops.append(np.asarray(image.crop((left, top, left + 256, top + 256)).resize((side, side))))
    return torch.from_numpy(np.stack(crops))


def original_step(model: Classifier, warped, labels) -> torch.Tensor:
    """The original's step: a forward pass per view in evaluation mode, then a training step on the worst view.

    `warped(v)` is view v of every image, float [B, 3, S, S] in [0, 1]. Sets the gradient; returns the views picked.
    """
    best_loss, best = torch.full((len(labels),), -1.0), warped(0)
    choice = torch.zeros(len(labels), dtype=torch.long)
    model.eval()
    for view in range(11):
        moved = warped(view)
        with torch.no_grad():
            loss = cross_entropy(model(moved), labels, reduction="none")
        worse = loss > best_loss
        best_loss, choice = torch.where(worse, loss, best_loss), torch.where(worse, view, choice)
        best = torch.where(worse[:, None, None, None], moved, best)
    model.train()
    cross_entropy(model(best), labels).backward()
    return choice


@pytest.fixture(scope="module")
def warps():
    """Six photographs, eleven (degrees, tx, ty) for each (the first one is the identity), and labels."""
    limits = SpatialLimits.from_px(30)
    params = np.random.default_rng(11).uniform(-1, 1, (6, 11, 3)) * [limits.degrees, limits.translate, limits.translate]
    params[:, 0] = 0
    return photographs(64, 6), params, torch.tensor([1, 3, 5, 7, 2, 0])


def relative_difference(one: Classifier, other: Classifier) -> float:
    first, second = (
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) for model in (one, other)
    )
    return float((first - second).norm() / first.norm())


def test_the_step_picks_the_views_and_gives_the_gradient_of_the_original_step(warps):
    images, params, labels = warps
    views = warp(images, torch.from_numpy(matrices(params, 64)))
    torch.manual_seed(0)
    theirs = Classifier(classifier.build("resnet18", 10))
    with torch.no_grad():  # running statistics that matter
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    ours = copy.deepcopy(theirs)
    expected = original_step(theirs, lambda v: views[:, v].permute(0, 3, 1, 2).float() / 255, labels)
    result = step_of(ours, lr=0.0)(batch_of(views, labels))
    assert result.choice.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 2
    assert relative_difference(theirs, ours) < 1e-4


def test_with_the_original_warp_too_only_rounding_to_8_bits_differs(warps):
    """The warp as the original writes it, in normalized coordinates, without rounding to 8 bits."""
    images, params, labels = warps

    def warped(view: int) -> torch.Tensor:
        angle, tx, ty = (torch.tensor(column, dtype=torch.float32)[:, None, None] for column in params[:, view].T)
        cos, sin = torch.cos(torch.deg2rad(angle)), torch.sin(torch.deg2rad(angle))
        y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
        where = torch.stack([cos * x - sin * y + 2 * tx, sin * x + cos * y + 2 * ty], dim=-1)
        return grid_sample(images.permute(0, 3, 1, 2).float() / 255, where, align_corners=True)

    torch.manual_seed(0)
    # A smooth network: BatchNorm over six images would amplify the rounding of pixels.
    net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=3), nn.Tanh(), nn.Conv2d(8, 8, 5, stride=3), nn.Tanh(), nn.Flatten())
    theirs = Classifier(nn.Sequential(net, nn.Linear(8 * 6 * 6, 10)))
    ours = copy.deepcopy(theirs)
    expected = original_step(theirs, warped, labels)
    result = step_of(ours, lr=0.0)(batch_of(warp(images, torch.from_numpy(matrices(params, 64))), labels))
    assert result.choice.tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 2
    assert relative_difference(theirs, ours) < 1e-2


@pytest.fixture(scope="module")
def trained():
    """A small ResNet after 50 training steps, its step object, and images."""
    torch.manual_seed(1)
    model = Classifier(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).to(memory_format=torch.channels_last))
    step = step_of(model, lr=0.01)
    images = photographs(32, 4)
    params = np.random.default_rng(2).uniform(-1, 1, (4, 3, 3)) * [30, 0.1, 0.1]
    views = warp(images, torch.from_numpy(matrices(params, 32)))
    for number in range(50):
        step(batch_of(views, torch.tensor([1, 2, 3, 4]) + number % 2))
    return model, step, views.view(-1, 32, 32, 3)


def exact_logits(model: Classifier, views):
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        return twin(views.permute(0, 3, 1, 2).double() / 255)


def test_the_folded_scorer_equals_the_model_in_evaluation_mode(trained):
    model, step, views = trained
    expected = exact_logits(model, views)
    scale = expected.abs().max()
    assert (step.scorer(views) - expected).abs().max() < 1e-5 * scale
    half = FoldedJudge(model, torch.bfloat16)
    assert (half(views) - expected).abs().max() < 3e-2 * scale
    assert half(views).dtype == torch.float32
    with torch.no_grad():
        next(iter(model.net.parameters())).mul_(1.5)
    assert (step.scorer(views) - exact_logits(model, views)).abs().max() > 1e-3 * scale  # not before a refresh
    step.scorer.refresh()
    assert (step.scorer(views) - exact_logits(model, views)).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("make", [lambda m: FoldedJudge(m, torch.float32), lambda m: ModuleJudge(m, torch.float32)])
def test_judging_leaves_modes_gradients_and_statistics_alone(trained, make):
    model, _, views = trained
    model.train()
    model.net.layer1.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    make(model)(views)
    assert flags == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    model.train()


@pytest.mark.parametrize("arch", ["squeezenet1_1", "mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"])
def test_every_kind_of_network_is_judged_as_in_evaluation_mode(arch):
    torch.manual_seed(0)
    model = Classifier(classifier.build(arch, 7))
    views = photographs(64, 2)
    expected = exact_logits(model, views)
    found = FoldedJudge(model, torch.float32)(views)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max().clamp(min=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_networks_choose_and_train_as_plain_ones():
    views, labels = photographs(32, 24).view(8, 3, 32, 32, 3), torch.arange(8) % 10
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Classifier(classifier.build("resnet18", 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        step = TrainStep(
            model,
            optimizer,
            dtype=torch.float32,
            scored=True,
            views_per_forward=10,
            grad_accum_steps=2,
            compiled=compiled,
        )
        results = [step(batch_of(views, labels)) for _ in range(2)]
        fresh = FoldedJudge(model, torch.float32)(views.flatten(0, 1))
        assert step.scorer is not None
        torch.testing.assert_close(step.scorer(views.flatten(0, 1)), fresh, rtol=1e-3, atol=1e-3)
        found.append(results)
    # With random weights and a batch of four, each step amplifies rounding errors a thousandfold.
    for (plain, fused), tolerance in zip(zip(*found), (1e-3, 3e-2)):
        assert plain.choice.tolist() == fused.choice.tolist()
        torch.testing.assert_close(plain.loss, fused.loss, rtol=tolerance, atol=tolerance)


def test_grouped_batch_norm_normalizes_each_group_by_itself():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    plain = copy.deepcopy(net)
    surgery.group_batch_norm(net, 2)
    images = torch.rand(6, 3, 8, 8)
    expected = torch.cat([copy.deepcopy(plain)(group) for group in images.split(2)])
    torch.testing.assert_close(net(images), expected)
    first = copy.deepcopy(plain)
    first(images[:2])
    torch.testing.assert_close(net[1].running_mean, first[1].running_mean)
    torch.testing.assert_close(net[1].running_var, first[1].running_var)
    found = FoldedJudge(Classifier(nn.Sequential(net, nn.Flatten())), torch.float32)(photographs(8, 2))
    assert torch.isfinite(found).all()


def test_views_become_what_torchvision_makes_of_them():
    views = photographs(32, 2)
    for view, unit in zip(views, to_unit(views)):
        torch.testing.assert_close(unit, torchvision.transforms.functional.to_tensor(view.numpy()))
    assert to_unit(views).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_smoothed_labels_change_the_gradient_as_the_formula_says_and_nothing_that_is_told(grad_accum_steps):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    theirs, ours = Classifier(copy.deepcopy(net)).double(), Classifier(net)
    views, labels = golden.views_of(0), golden.labels_of(0)
    plain = step_of(Classifier(copy.deepcopy(net)), lr=0.0)(batch_of(views, labels))
    found = step_of(ours, lr=0.0, label_smoothing=0.3, grad_accum_steps=grad_accum_steps)(batch_of(views, labels))
    assert found.choice.tolist() == plain.choice.tolist()
    torch.testing.assert_close(found.loss, plain.loss)
    chosen = views[torch.arange(len(labels)), plain.choice]
    log_p = theirs(chosen.permute(0, 3, 1, 2).double() / 255).log_softmax(dim=1)
    loss = -(0.7 * log_p[torch.arange(len(labels)), labels] + 0.3 * log_p.mean(dim=1)).mean()
    loss.backward()
    for one, other in zip(theirs.parameters(), ours.parameters()):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad.double(), rtol=1e-4, atol=1e-5)


def test_the_worst_view_is_the_same_whatever_the_smoothing():
    """With much smoothing, a confident right view has a higher smoothed loss than a slightly wrong one."""
    layer = nn.Linear(3 * 8 * 8, 4, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0, 0], layer.weight[1, 1] = 9.0, 0.2
    net = nn.Sequential(nn.Flatten(), layer)
    views = torch.zeros(1, 2, 8, 8, 3, dtype=torch.uint8)
    views[0, 0, 0, 0, 0], views[0, 1, 0, 1, 0] = 255, 255
    model = Classifier(net, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    labels = torch.tensor([0])
    with torch.no_grad():
        logits = model(views[0])
    smoothed = cross_entropy(logits, labels.expand(2), reduction="none", label_smoothing=0.9)
    assert smoothed[0] > smoothed[1]
    found = step_of(model, lr=0.0, label_smoothing=0.9)(batch_of(views, labels))
    assert found.choice.tolist() == [1]


def test_flips_are_averaged_as_two_forward_passes_are(trained):
    model, _, views = trained
    judge = FlipJudge(FoldedJudge(model, torch.float32))
    mirrored = torch.from_numpy(views.numpy()[:, :, ::-1].copy())
    expected = (exact_logits(model, views) + exact_logits(model, mirrored)) / 2
    assert (judge(views) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (judge(views) - exact_logits(model, views)).abs().max() > 1e-2 * expected.abs().max()
    images, matrices_BV23 = views[:2], torch.from_numpy(matrices(np.array([[[0, 0, 0], [20, 0.1, 0.0]]] * 2), 32))
    found = BatchedForward(judge, 3, pad=True).warped(images, matrices_BV23)
    assert (found - judge(warp(images, matrices_BV23).flatten(0, 1)).view_as(found)).abs().max() < 1e-5


def test_decay_spares_what_has_one_dimension_if_asked():
    model = Classifier(classifier.build("resnet18", 10))
    names = {id(p): name for name, p in model.net.named_parameters()}
    raw = {"data": "d", "out": "o", "mode": "standard", "weight_decay": "0.01"}
    (everything,) = make_optimizer(parse(TrainConfig, raw), model).param_groups
    assert (len(everything["params"]), everything["weight_decay"]) == (62, 0.01)
    some = make_optimizer(parse(TrainConfig, {**raw, "bn_weight_decay": "false"}), model).param_groups
    assert [group["weight_decay"] for group in some] == [0.01, 0.0]
    decaying, spared = ({names[id(p)] for p in group["params"]} for group in some)
    assert spared == {n for n in names.values() if "bn" in n or "downsample.1" in n or n.endswith("bias")}
    assert decaying == set(names.values()) - spared and len(decaying) == 21


def test_blurpool_is_the_binomial_filter_before_every_stride_but_the_first():
    torch.manual_seed(0)
    net = classifier.build("resnet18", 10).eval()
    plain = copy.deepcopy(net)
    surgery.blur_before_strides(net)
    assert net.state_dict().keys() == plain.state_dict().keys()
    blurred = [name for name, module in net.named_modules() if surgery._blur in module._forward_pre_hooks.values()]
    assert blurred == [f"layer{n}.0.{part}" for n in (2, 3, 4) for part in ("conv1", "downsample.0")]
    images = torch.randn(2, 64, 9, 9)
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(64, 1, 3, 3)
    expected = plain.get_submodule("layer2.0.conv1")(conv2d(images, kernel, padding=1, groups=64))
    torch.testing.assert_close(net.get_submodule("layer2.0.conv1")(images), expected, rtol=1e-4, atol=1e-5)
    # The scorer's folded copy is blurred as well.
    model, views = Classifier(net), photographs(64, 2)
    expected = exact_logits(model, views)
    scorer = FoldedJudge(model, torch.float32)
    assert len(scorer._pairs) == 20
    assert (scorer(views) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (expected - exact_logits(Classifier(plain), views)).abs().max() > 1e-2 * expected.abs().max()
    assert surgery.has_blurpool(model) and not surgery.has_blurpool(plain)


def test_the_weights_of_a_stride_that_meet_only_padding_have_no_gradient_in_bfloat16():
    conv = nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False, dtype=torch.bfloat16)
    surgery.widen_before_strides(conv)
    expected = torch.zeros(64, 64, 3, 3, dtype=torch.bfloat16)
    expected[:, :, 1, 1] = 16
    for _ in range(20):
        torch.full((16, 64, 64), float("nan"))  # for the memory that is allocated next
        (gradient,) = torch.autograd.grad(conv(torch.ones(16, 64, 1, 1, dtype=torch.bfloat16)).sum(), conv.weight)
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("blurpool", ["false", "true"])
def test_maps_narrower_than_a_stride_are_widened_in_bfloat16_on_cpus_and_the_logits_stay(blurpool):
    raw = {"data": "d", "out": "o", "mode": "standard", "blurpool": blurpool}
    config, cpu = parse(TrainConfig, raw), torch.device("cpu")
    widened, plain = (make_step(config, 10, cpu, dtype).model.eval() for dtype in (torch.bfloat16, torch.float32))
    plain.load_state_dict(widened.state_dict())
    widths: list[int] = []
    conv = widened.net.get_submodule("layer4.0.conv1")
    conv.register_forward_hook(lambda _, inputs, output: widths.extend((inputs[0].shape[3], output.shape[3])))
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(widened(images), plain(images), rtol=1e-4, atol=1e-5)
    assert widths == [2, 1]


def test_views_may_change_their_side_from_step_to_step():
    torch.manual_seed(0)
    step = step_of(Classifier(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)), lr=0.0)
    labels = torch.arange(4)
    for side in (32, 48, 32):
        views = photographs(side, 12).view(4, 3, side, side, 3)
        losses = cross_entropy(
            exact_logits(step.model, views.flatten(0, 1)), labels.repeat_interleave(3), reduction="none"
        ).view(4, 3)
        assert step(batch_of(views, labels)).choice.tolist() == losses.argmax(dim=1).tolist()
