"""The optimizer and its learning rate."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Fused SGD over all parameters.

    Without `bn_weight_decay`, one-dimensional parameters (normalization layers and biases) have no weight decay.
    """
    settings: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if not config.bn_weight_decay:
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if config.optimizer == "apex":
        optimizer: torch.optim.Optimizer = find_apex_sgd()(groups, **settings)
        return optimizer
    return torch.optim.SGD(groups, **settings, fused=True)


def find_apex_sgd() -> type[torch.optim.Optimizer]:
    """NVIDIA apex's FusedSGD.

    Raises:
        UserError: if NVIDIA's apex is missing (`pip install apex` installs an unrelated package), or no GPU is visible.

    """
    try:
        importlib.import_module("amp_C")  # the compiled kernels: only NVIDIA's apex has them
        found = importlib.import_module("apex.optimizers").FusedSGD
    except (ImportError, AttributeError):
        raise UserError(
            "--optimizer apex: NVIDIA's apex with its CUDA kernels is not installed (`pip install apex` installs an "
            "unrelated package)",
            "use --optimizer sgd, or an environment with NVIDIA's apex, such as NVIDIA's PyTorch images",
        ) from None
    if not torch.cuda.is_available():
        raise UserError("--optimizer apex: FusedSGD needs a GPU, and none is visible", "use --optimizer sgd")
    return found  # type: ignore[no-any-return]
