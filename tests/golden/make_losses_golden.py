"""Golden losses of ten worst-of-3 training steps, in plain torch: nothing of the project is imported.

    python tests/golden/make_losses_golden.py > tests/golden/losses.json

Weights and images follow from formulas, not from a random generator, so any torch version gives the same start.
"""

from __future__ import annotations

import json

import torch
from torch import nn
from torch.nn.functional import cross_entropy

STEPS, B, V, S, K = 10, 6, 3, 8, 4
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def tiny() -> nn.Module:
    """A small network with BatchNorm, its weights set by a formula."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, K),
    )
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            if parameter.ndim > 1:
                positions = torch.arange(parameter.numel(), dtype=torch.float64)
                parameter.copy_((0.3 * torch.sin(1.7 * positions + number)).view_as(parameter))
        net[-1].bias.zero_()  # type: ignore[operator]
    return net


def views_of(step: int) -> torch.Tensor:
    """uint8 [B, V, S, S, 3], by a formula."""
    positions = torch.arange(B * V * S * S * 3, dtype=torch.int64)
    return ((positions * 7919 + step * 104729 + (positions // 97) * 31) % 256).to(torch.uint8).view(B, V, S, S, 3)


def labels_of(step: int) -> torch.Tensor:
    """int64 [B]."""
    return (torch.arange(B) + step) % K


def main() -> None:
    """Train as the original does, one view after the other, and print losses and chosen views."""
    net = tiny()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses, choices = [], []
    for step in range(STEPS):
        views, labels = views_of(step), labels_of(step)
        inputs = (views.double() / 255 - MEAN.double()) / STD.double()
        inputs = inputs.float().permute(0, 1, 4, 2, 3)
        net.eval()
        with torch.no_grad():
            each = torch.stack([cross_entropy(net(inputs[:, v]), labels, reduction="none") for v in range(V)], dim=1)
        choice = each.argmax(dim=1)
        net.train()
        loss = cross_entropy(net(inputs[torch.arange(B), choice]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 6))
        choices.append(choice.tolist())
    print(json.dumps({"losses": losses, "choices": choices}))


if __name__ == "__main__":
    main()
