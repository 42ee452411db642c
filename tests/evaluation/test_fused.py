"""Networks whose convolutions rectify by themselves compute what they did."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import fx, nn

from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.fused import (
    ConvReLU,
    MaxPool,
    Zeros,
    blocks_of,
    fuse_relu,
    is_fusable,
    kernel_of_blocks,
    lighten_pools,
    unroll_stem,
)
from fast_spatial.models import classifier, surgery
from fast_spatial.models.classifier import Classifier

# ResNet-18: a stem, and two of each of eight blocks; ReLU6 and SiLU are left alone.
FUSED = {"resnet18": 17, "resnet50": 49, "vgg11_bn": 8, "mobilenet_v2": 0, "regnet_x_400mf": 45, "densenet121": 59}


@pytest.mark.parametrize("arch", FUSED)
def test_a_fused_twin_judges_as_before(arch):
    torch.manual_seed(0)
    judge = FoldedJudge(Classifier(classifier.build(arch, 10)), torch.float32)
    views = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    expected = judge(views)
    assert judge._twin is not None and fuse_relu(judge._twin) == FUSED[arch]
    torch.testing.assert_close(judge(views), expected, rtol=1e-4, atol=1e-5)
    assert sum(isinstance(module, ConvReLU) for module in judge._twin.modules()) == FUSED[arch]


def test_a_fused_twin_follows_the_weights():
    torch.manual_seed(0)
    model = Classifier(classifier.build("resnet18", 10))
    judge = FoldedJudge(model, torch.float32)
    assert judge._twin is not None and fuse_relu(judge._twin)
    views = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    judge.refresh()
    torch.testing.assert_close(judge(views), FoldedJudge(model, torch.float32)(views), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["resnet18", "vgg11_bn"])  # convolutions without biases, and with them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_weights_are_those_of_each_layer_alone(arch, dtype):
    torch.manual_seed(0)
    model = Classifier(classifier.build(arch, 10))
    judge = FoldedJudge(model, dtype)
    with torch.no_grad():
        for tensor in (*model.net.parameters(), *model.net.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0)
        judge.refresh()
        for conv, norm, folded in judge._pairs:
            assert norm.running_mean is not None and norm.running_var is not None and folded.bias is not None
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            bias = norm.bias - norm.running_mean * scale
            assert torch.equal(folded.weight, (conv.weight * scale.view(-1, 1, 1, 1)).to(dtype))
            assert torch.equal(folded.bias, (bias if conv.bias is None else bias + conv.bias * scale).to(dtype))


class Odd(nn.Module):
    """What must not be fused: a convolution read twice, one called twice, padding by name, a weight that is added,
    groups, what only has the name of a ReLU, and a convolution whose input is changed before its ReLU comes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.twice, self.named = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.mirrored = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.named.padding = "same"
        self.offset = nn.Parameter(torch.randn(3, 1, 1))
        self.moved, self.named_only, self.early = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.grouped = nn.Conv2d(3, 3, 1, groups=3)
        self.relu, self.in_place = nn.Hardswish(), nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.shared(x)
        x = torch.relu(shared) + shared
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        x = torch.relu(self.mirrored(torch.relu(self.named(x))))
        x = torch.relu(self.moved(x) + self.offset) - 0.5
        x = self.relu(self.named_only(torch.relu(self.grouped(x)) - 0.5))
        early = self.early(x)
        shortcut = self.in_place(x)
        return torch.relu(early + shortcut)


def test_what_is_not_a_plain_convolution_and_a_shortcut_stays():
    network = fx.symbolic_trace(Odd())
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(network)(x)
    assert fuse_relu(network) == 0
    assert torch.equal(network(x), expected)


def test_repeatable_runs_judge_with_kernels_that_torch_chooses(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    assert is_fusable(cuda, torch.bfloat16) and is_fusable(cuda, torch.float16)
    assert not is_fusable(cuda, torch.float32)
    assert not is_fusable(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not is_fusable(cuda, torch.bfloat16)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(7, 2, 3, 1), (3, 1, 1, 1), (3, 2, 0, 2), (1, 1, 0, 1)]
)
def test_the_zeros_have_the_shape_of_what_they_are_added_to(monkeypatch, kernel, stride, padding, dilation):
    conv = nn.Conv2d(3, 8, kernel, stride, padding, dilation)
    x = torch.randn(2, 3, 19, 23)
    asked = []

    def add_relu(x, weight, shortcut, share, bias, stride, padding, dilation, groups):
        asked.append((shortcut, share))
        return torch.relu(nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups))

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    on_gpu = mock.Mock(wraps=x, device=torch.device("cuda", 0), shape=x.shape, dtype=x.dtype, __len__=lambda _: len(x))
    zeros = Zeros()
    monkeypatch.setattr(zeros, "like", lambda _, shape: Zeros().like(x, shape))
    made = ConvReLU(conv, zeros)
    monkeypatch.setattr(nn.functional, "conv2d", lambda _, *rest: torch.conv2d(x, *rest))
    out = made(on_gpu)
    ((added, share),) = asked
    assert added.shape == out.shape and share == 0.0 and not added.any()
    assert added.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 12), (11, 7)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_stem_of_blocks_is_the_stem(kernel, height, width, channels):
    torch.manual_seed(0)
    x, weight = torch.randn(2, channels, height, width), torch.randn(6, channels, kernel, kernel)
    expected = nn.functional.conv2d(x.double(), weight.double(), stride=2, padding=kernel // 2)
    blocks, weights = blocks_of(x.contiguous(memory_format=torch.channels_last), kernel), kernel_of_blocks(weight)
    assert blocks.shape[1] % 8 == weights.shape[1] % 8 == 0
    assert blocks.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(nn.functional.conv2d(blocks.double(), weights.double()), expected)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "vgg11_bn"])
def test_a_twin_with_an_unrolled_stem_judges_as_before(arch, monkeypatch):
    torch.manual_seed(0)
    model = Classifier(classifier.build(arch, 10))
    views = torch.randint(0, 256, (2, 65, 65, 3), dtype=torch.uint8)
    expected = FoldedJudge(model, torch.float32)(views)
    monkeypatch.setattr("fast_spatial.evaluation.folded.is_fusable", lambda *_: True)
    judge = FoldedJudge(model, torch.float32)
    assert judge._twin is not None
    torch.testing.assert_close(judge(views), expected, rtol=1e-4, atol=1e-5)
    unrolled = [node for node in judge._twin.graph.nodes if node.target is blocks_of]
    assert len(unrolled) == (arch != "vgg11_bn")  # whose first convolution does not stride


class Stems(nn.Module):
    """What is not a stem: more channels, strides of three, another border, an even kernel, one read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.far = nn.Conv2d(8, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, 3, 1)
        self.bare, self.even = nn.Conv2d(3, 3, 3, 2), nn.Conv2d(3, 3, 4, 2, 1)
        self.twice, self.pointwise = nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.even(self.bare(self.far(self.wide(x))))
        out: torch.Tensor = self.pointwise(self.twice(self.twice(x)))
        return out


def test_what_is_not_a_stem_stays():
    network = fx.symbolic_trace(Stems())
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 6 and all(unroll_stem(network, conv) is conv for conv in convs)


def test_pools_that_need_more_than_values_stay():
    pools = [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2, dilation=2), nn.AvgPool2d(2)]
    network = fx.symbolic_trace(nn.Sequential(*pools))
    x = torch.randn(1, 2, 32, 32)
    expected = copy.deepcopy(network)(x)
    assert lighten_pools(network) == 1
    assert [isinstance(module, MaxPool) for module in network.children()] == [True, False, False, False]
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_twin_that_blurs_before_its_strides_goes_on_blurring(arch, monkeypatch):
    """Blurring is a hook of a convolution, which a kernel of cuDNN would leave out."""
    torch.manual_seed(0)
    net = classifier.build(arch, 10)
    surgery.blur_before_strides(net)
    blurred = sum(bool(module._forward_pre_hooks) for module in net.modules())
    monkeypatch.setattr("fast_spatial.evaluation.folded.is_fusable", lambda *_: True)
    twin = FoldedJudge(Classifier(net), torch.float32)._twin
    assert twin is not None
    wrapped = [module.conv for module in twin.modules() if isinstance(module, ConvReLU)]
    assert wrapped and not any(conv._forward_pre_hooks for conv in wrapped)
    assert sum(bool(module._forward_pre_hooks) for module in twin.modules()) == blurred > 0


def test_layers_with_hooks_are_not_rewritten():
    network = fx.symbolic_trace(
        nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU())
    )
    conv, _, pool, _, relu = network.children()
    for layer in (conv, pool, relu):
        layer.register_forward_pre_hook(lambda *_: None)
    assert isinstance(conv, nn.Conv2d)
    assert unroll_stem(network, conv) is conv
    assert fuse_relu(network) == lighten_pools(network) == 0


def test_rewriting_a_stem_draws_no_random_numbers():
    network = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3)))
    conv = network.get_submodule("0")
    assert isinstance(conv, nn.Conv2d)
    before = torch.get_rng_state()
    assert unroll_stem(network, conv) is not conv
    assert torch.equal(torch.get_rng_state(), before)


def test_a_scorer_is_compiled_where_nothing_else_fuses_it(monkeypatch):
    compiled: list[nn.Module] = []
    monkeypatch.setattr("fast_spatial.evaluation.folded.compile_network", compiled.append)
    model = Classifier(classifier.build("resnet18", 10))
    assert not FoldedJudge(model, torch.float32).compiled and not compiled
    assert FoldedJudge(model, torch.float32, compiled=True).compiled and len(compiled) == 1
    monkeypatch.setattr("fast_spatial.evaluation.folded.is_fusable", lambda *_: True)
    assert not FoldedJudge(model, torch.float32, compiled=True).compiled and len(compiled) == 1


class Counted(nn.Module):
    """A network of which tracing makes a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.conv(x)).mean(dim=(2, 3)) * torch.tensor([1.0, 2.0, 3.0, 4.0])
        return out


def test_a_constant_of_the_tracer_s_is_no_weight():
    torch.manual_seed(0)
    model = Classifier(Counted()).eval()
    views = torch.randint(0, 256, (2, 9, 9, 3), dtype=torch.uint8)
    judge = FoldedJudge(model, torch.float32)
    assert judge._twin is not None
    torch.testing.assert_close(judge(views), model(views))


@pytest.mark.parametrize("hooked", ["0", "1"])
def test_what_a_hook_does_after_a_convolution_or_a_norm_is_judged_too(hooked):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    net.get_submodule(hooked).register_forward_hook(lambda module, inputs, output: output + 3)
    model = Classifier(net).eval()
    views = torch.randint(0, 256, (2, 9, 9, 3), dtype=torch.uint8)
    judge = FoldedJudge(model, torch.float32)
    assert len(judge._pairs) == 1
    torch.testing.assert_close(judge(views), model(views))
