"""Networks whose convolutions rectify by themselves compute what they did."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

from fast_spatial import model as models
from fast_spatial.fused import ConvReLU, fuse_relu
from fast_spatial.model import Classifier
from fast_spatial.scoring import Scorer

# ResNet-18: a stem, and two of each of eight blocks; ReLU6 and SiLU are left alone.
FUSED = {"resnet18": 17, "resnet50": 49, "vgg11_bn": 8, "mobilenet_v2": 0, "regnet_x_400mf": 67, "densenet121": 59}


@pytest.mark.parametrize("arch", FUSED)
def test_a_fused_twin_judges_as_before(arch):
    torch.manual_seed(0)
    scorer = Scorer(Classifier(models.build(arch, 10)), torch.float32)
    views = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    expected = scorer(views)
    assert scorer._twin is not None and fuse_relu(scorer._twin) == FUSED[arch]
    torch.testing.assert_close(scorer(views), expected, rtol=1e-4, atol=1e-5)
    assert sum(isinstance(module, ConvReLU) for module in scorer._twin.modules()) == FUSED[arch]


def test_a_fused_twin_follows_the_weights():
    torch.manual_seed(0)
    model = Classifier(models.build("resnet18", 10))
    scorer = Scorer(model, torch.float32)
    assert scorer._twin is not None and fuse_relu(scorer._twin)
    views = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    scorer.refresh()
    torch.testing.assert_close(scorer(views), Scorer(model, torch.float32)(views), rtol=1e-4, atol=1e-5)


class Odd(nn.Module):
    """What must not be fused: a convolution read twice, one called twice, padding by name, a weight that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.twice, self.named = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.mirrored = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.named.padding = "same"
        self.offset = nn.Parameter(torch.randn(3, 1, 1))
        self.moved = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.shared(x)
        x = torch.relu(shared) + shared
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        x = torch.relu(self.mirrored(torch.relu(self.named(x))))
        return torch.relu(self.moved(x) + self.offset)


def test_what_is_not_a_plain_convolution_and_a_shortcut_stays():
    network = fx.symbolic_trace(Odd())
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(network)(x)
    assert fuse_relu(network) == 0
    assert torch.equal(network(x), expected)
