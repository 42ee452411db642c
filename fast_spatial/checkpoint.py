"""Checkpoints: written atomically, read without running code, whoever wrote them.

Ours are `{"format", "model", "arch", "classes", "config", "epoch", "optimizer", ...}` with torchvision's parameter
names. The original code's (`{"model": {"module.model.*": ...}}`, saved with dill) and plain state dicts (.pt, .pth,
.safetensors) are read too.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast_spatial import model as models
from fast_spatial.files import write_atomically
from fast_spatial.model import Classifier

FORMAT = "fast_spatial 1"


def save(path: Path, payload: dict[str, Any]) -> None:
    """Write a checkpoint so that the file is always whole: to a temporary file, then renamed."""
    write_atomically(path, lambda file: torch.save(payload, file))


def load(path: Path) -> dict[str, Any]:
    """Everything a file holds, on the CPU.

    Raises:
        ValueError: if it cannot be read, or holds more than tensors and plain values.

    """
    if not path.is_file():
        raise ValueError(f"--checkpoint {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return {"model": load_file(path)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers and safetensors raise a dozen kinds
        refused = re.search(r"Unsupported (?:global|class|operand|instruction)[^\n]*|GLOBAL \S+", str(error))
        reason = f" ({refused[0]})" if refused else ""
        raise ValueError(
            f"--checkpoint {path}: not a checkpoint that can be read safely{reason}\n"
            f"expected a file written by torch.save that holds tensors and plain values, or .safetensors"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"--checkpoint {path}: holds a {type(found).__name__}, not a dictionary of tensors")
    return found


@dataclass(frozen=True)
class Weights:
    """A classifier's weights as found in a file, and what the file says about them (None where it is silent)."""

    state: dict[str, Tensor]
    num_classes: int
    arch: str | None = None
    classes: tuple[str, ...] | None = None
    side: int | None = None
    mean: tuple[float, ...] = models.IMAGENET_MEAN
    std: tuple[float, ...] = models.IMAGENET_STD


def read_weights(path: Path) -> Weights:
    """The weights in a checkpoint of ours, of the original code, or in a plain state dict.

    Raises:
        ValueError: if the file holds no classifier's weights.

    """
    content = load(path)
    if content.get("format") == FORMAT:
        config = content["config"]
        state = content["model"]
        return Weights(state, len(content["classes"]), content["arch"], tuple(content["classes"]), config["side"])
    state = content
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            state = content[key]
            break
    state = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    mean, std = models.IMAGENET_MEAN, models.IMAGENET_STD
    if any(name.startswith("module.model.") for name in state):
        if "module.normalizer.new_mean" in state:
            mean = tuple(state["module.normalizer.new_mean"].flatten().tolist())
            std = tuple(state["module.normalizer.new_std"].flatten().tolist())
        state = {k.removeprefix("module.model."): v for k, v in state.items() if k.startswith("module.model.")}
    elif state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    heads = [name for name in state if name.split(".", maxsplit=1)[0] in ("fc", "classifier", "head", "heads")]
    if not heads:
        raise ValueError(f"--checkpoint {path}: holds no weights of a classifier (its keys: {_some(list(content))})")
    last = max(heads, key=lambda name: [(part.isdigit(), part.zfill(3)) for part in name.split(".")])
    return Weights(state, len(state[last]), mean=mean, std=std)


def build_classifier(path: Path, weights: Weights, arch: str) -> Classifier:
    """The classifier with these weights; `arch` is what was asked for, or empty.

    Raises:
        ValueError: if the weights are of another architecture.

    """
    if arch and weights.arch and arch != weights.arch:
        raise ValueError(f"--checkpoint {path}: it is a {weights.arch}, not a {arch}\nleave --arch away")
    arch = arch or weights.arch or "resnet18"
    expected = models.shapes_of(arch, weights.num_classes).state_dict()
    missing = [name for name in expected if name not in weights.state]
    extra = [name for name in weights.state if name not in expected]
    shapes = [n for n in expected if n in weights.state and expected[n].shape != weights.state[n].shape]
    if missing or extra or shapes:
        parts = (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        listed = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in parts if names)
        raise ValueError(
            f"--checkpoint {path}: these are not the weights of a {arch} with {weights.num_classes} classes\n{listed}; "
            f"name the right one with --arch"
        )
    if any(not torch.isfinite(value).all() for value in weights.state.values() if value.is_floating_point()):
        raise ValueError(f"--checkpoint {path}: some of its weights are not finite numbers; the training diverged")
    net: nn.Module = models.build(arch, weights.num_classes)
    net.load_state_dict(weights.state)
    return Classifier(net, weights.mean, weights.std)


def _some(names: list[str]) -> str:
    return ", ".join(map(str, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
