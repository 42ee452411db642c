"""The EMA of the weights, computed by hand."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fast_spatial.models.classifier import Classifier
from fast_spatial.models.ema import WeightEma


def network() -> Classifier:
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)))


def test_the_average_follows_the_recursion_batch_norms_statistics_included():
    model = network()
    average = WeightEma(model, 0.75)
    expected = {name: value.double() for name, value in model.net.state_dict().items()}
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.net.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.net(torch.rand(6, 3, 8, 8))
        for name, value in model.net.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * value.double()
        average.update()
    found = average.state_dict()
    assert found.keys() == expected.keys()
    assert found.pop("1.num_batches_tracked") == 5  # a count is copied
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(found["1.running_var"], torch.ones(4))


def test_the_average_is_a_network_of_its_own():
    model = network()
    before = copy.deepcopy(model.net.state_dict())
    average = WeightEma(model, 0.5)
    weight = model.net.state_dict()["0.weight"]
    weight += 1.0
    assert torch.equal(average.state_dict()["0.weight"], before["0.weight"])
    average.update()
    torch.testing.assert_close(average.state_dict()["0.weight"], before["0.weight"] + 0.5)
    torch.testing.assert_close(model.net.state_dict()["0.weight"], before["0.weight"] + 1.0)
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
