"""A moving average of a network's weights, to be judged and kept instead of the weights themselves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fast_spatial.models.classifier import Classifier


class WeightEma:
    """After every step, average = decay * average + (1 - decay) * weights; it begins as the weights it is given.

    BatchNorm's running means and variances are averaged in the same way, so that they belong to the averaged weights as
    well as those of the last steps did to theirs; counts (integers) are copied.

    Attributes:
        model: a classifier under the averaged weights.

    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay
        average, weights = self.model.net.state_dict(), model.net.state_dict()
        floats = [name for name, value in average.items() if value.is_floating_point()]
        self._averages, self._weights = ([state[name] for name in floats] for state in (average, weights))
        self._counts = [(average[name], weights[name]) for name in average if name not in floats]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of a step."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)
        for count, current in self._counts:
            count.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the network's names."""
        return self.model.net.state_dict()
