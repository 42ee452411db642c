"""EMA (exponential moving average) of a network's weights, evaluated and saved instead of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from fast_spatial.models.classifier import Classifier


class WeightEma:
    """After each step, average = decay * average + (1 - decay) * weights; it starts from the initial weights.

    BatchNorm's running means and variances are averaged in the same way, so that they match the averaged weights.
    Integer counters are copied.

    Attributes:
        model: a classifier with the averaged weights.

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
        """Update the average after a step."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self._decay)
        for count, current in self._counts:
            count.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, with the network's names."""
        return self.model.net.state_dict()
