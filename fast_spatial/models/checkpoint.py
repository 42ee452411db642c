"""Checkpoints: read without running code, whatever their source.

This program writes `{"format", "model", "arch", "classes", "config", "epoch", "optimizer", ...}` with torchvision's
parameter names. It also reads checkpoints of the original code (`{"model": {"module.model.*": ...}}`, saved with dill)
and plain state dicts (.pt, .pth, .safetensors). Weights may be float32, bfloat16, float16 or float64; networks compute
in float32.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast_spatial.config.fields import todays_names
from fast_spatial.errors import UserError
from fast_spatial.kernels.limits import MAX_SIDE
from fast_spatial.models import classifier, surgery, untrusted
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.text import some

FORMAT = "fast_spatial 1"
DEFAULT_ARCH = "resnet18"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class DamagedCheckpoint(UserError):
    """A file that is not a checkpoint, or is incomplete or damaged."""


def load(path: Path) -> dict[str, Any]:
    """The content of a file, on the CPU: tensors and plain values, with no more bytes than the file.

    Raises:
        DamagedCheckpoint: if the file is damaged, or holds anything else.
        UserError: if the file is missing, a folder, or not readable.

    """
    if os.path.isdir(path):
        raise UserError(f"--checkpoint {path}: is a folder", "give a file, such as best.pt in a run's folder")
    if not os.path.isfile(path):
        raise UserError(f"--checkpoint {path}: file not found", "give a file written by train or torch.save")
    if not os.access(path, os.R_OK):
        raise UserError(f"--checkpoint {path}: permission denied", "make it readable, or use another file")
    try:
        return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except untrusted.Refused as error:
        raise DamagedCheckpoint(f"--checkpoint {path}: {error.message}", error.advice) from None
    except Exception as error:  # unpicklers, zip readers and safetensors raise dozens of types
        reason = "out of memory" if isinstance(error, MemoryError) else ""
        refused = untrusted.unsafe(reason)
        raise DamagedCheckpoint(f"--checkpoint {path}: {refused.message}", refused.advice) from None


def _read_torch(path: Path) -> dict[str, Any]:
    untrusted.check_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(path, map_location="cpu", weights_only=True)
    untrusted.check_content(content, path.stat().st_size)
    if not isinstance(content, dict):
        raise untrusted.Refused(
            f"holds a {type(content).__name__}, not a dictionary of tensors",
            "expected the state_dict() of a classifier",
        )
    return content


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors under "model", with the metadata of files that this program exported."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    if about.get("format") == FORMAT:
        content |= {"format": FORMAT, "arch": about.get("arch")}
        content |= {name: json.loads(about[name]) for name in ("classes", "mean", "std")}
        content["config"] = {"image_size": json.loads(about["side"])}
    return content


@dataclass(frozen=True)
class Weights:
    """A classifier's weights in a file, and the file's metadata (None where missing).

    `side` is the image size of its evaluations, pixels.
    """

    state: dict[str, Tensor]
    num_classes: int
    arch: str | None = None
    classes: tuple[str, ...] | None = None
    side: int | None = None
    blurpool: bool = False
    mean: tuple[float, ...] = classifier.IMAGENET_MEAN
    std: tuple[float, ...] = classifier.IMAGENET_STD


def read_weights(path: Path) -> Weights:
    """The weights in a checkpoint of this program, of the original code, or in a plain state dict.

    Raises:
        UserError: if the file has no classifier weights.

    """
    content = load(path)
    kind = content.get("format")
    if kind == FORMAT:
        return _read_ours(path, content)
    if isinstance(kind, str) and kind.startswith("fast_spatial "):
        raise UserError(
            f"--checkpoint {path}: its format is {some([kind])}, but this version reads {FORMAT}",
            "use the version of the program that wrote it",
        )
    return _read_others(path, content)


def _read_ours(path: Path, content: dict[str, Any]) -> Weights:
    arch, classes, config, state = (content.get(key) for key in ("arch", "classes", "config", "model"))
    config = todays_names(config) if isinstance(config, dict) else {}
    side, blurpool = config.get("eval_size") or config.get("image_size"), config.get("blurpool", False)
    mean, std = content.get("mean", classifier.IMAGENET_MEAN), content.get("std", classifier.IMAGENET_STD)
    unnamed = classes is None and path.suffix == ".safetensors"  # an export of weights without class names
    right = {
        "model": isinstance(state, dict) and all(isinstance(name, str) for name in state),
        "arch": isinstance(arch, str) and arch in classifier.known_archs(),
        "classes": unnamed or _are_names(classes),
        "config.blurpool": type(blurpool) is bool,
        "config.image_size": type(side) is int and 1 <= side <= MAX_SIDE,
        "mean and std": _is_normalization(mean, std),
    }
    if not all(right.values()):
        raise UserError(
            f"--checkpoint {path}: missing or invalid: {', '.join(name for name, well in right.items() if not well)}",
            "use another checkpoint",
        )
    assert isinstance(state, dict)
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"--checkpoint {path}: its model has entries that are not tensors: {some(others)}", "use another checkpoint"
        )
    num_classes = _outputs(path, state) if classes is None else len(classes)
    return Weights(state, num_classes, arch, classes and tuple(classes), side, blurpool, tuple(mean), tuple(std))


def _are_names(classes: Any) -> bool:
    listed = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
    return listed and len(set(classes)) == len(classes) > 0


def _is_normalization(mean: Any, std: Any) -> bool:
    return all(
        isinstance(values, (list, tuple))
        and len(values) == 3
        and all(type(value) is float and math.isfinite(value) for value in values)
        for values in (mean, std)
    ) and all(value > 0 for value in std)


def _read_others(path: Path, content: dict[str, Any]) -> Weights:
    found = content
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), dict):
            found = content[key]
            break
    state = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    mean, std = classifier.IMAGENET_MEAN, classifier.IMAGENET_STD
    if any(name.startswith("module.model.") for name in state):
        numbers = [state.get(f"module.normalizer.{name}") for name in ("new_mean", "new_std")]
        if any(value is not None for value in numbers):
            mean, std = (
                tuple(value.double().flatten().tolist()) if value is not None and value.numel() == 3 else ()
                for value in numbers
            )
            if not _is_normalization(mean, std):
                raise UserError(
                    f"--checkpoint {path}: its module.normalizer has no valid mean and deviation of three channels",
                    "use another checkpoint",
                )
        state = {k.removeprefix("module.model."): v for k, v in state.items() if k.startswith("module.model.")}
    elif state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return Weights(state, _outputs(path, state or content), mean=mean, std=std)


def _outputs(path: Path, state: dict[Any, Any]) -> int:
    """The number of outputs: rows of the last tensor of a torchvision head."""
    names = [name for name in state if isinstance(name, str)]
    heads = [name for name in names if name.split(".", maxsplit=1)[0] in ("fc", "classifier", "head", "heads")]
    last = max(heads, key=lambda name: [(part.isdigit(), part.zfill(3)) for part in name.split(".")], default="")
    shape = state[last].shape if last and isinstance(state[last], Tensor) else ()
    if not shape or not shape[0]:
        raise UserError(
            f"--checkpoint {path}: no classifier weights found (keys: {some(names)})",
            "expected the state_dict() of a torchvision classifier, at the top level or under model or state_dict",
        )
    return int(shape[0])


def build_classifier(path: Path, weights: Weights, arch: str) -> Classifier:
    """The classifier with these weights, in float32; `arch` is the requested architecture, or empty.

    Raises:
        UserError: if the weights are of another architecture, or are NaN or inf.

    """
    if arch and weights.arch and arch != weights.arch:
        raise UserError(f"--checkpoint {path}: contains a {weights.arch}, but --arch is {arch}", "remove --arch")
    arch = arch or weights.arch or DEFAULT_ARCH
    differences = _differences(weights.state, classifier.shapes_of(arch, weights.num_classes).state_dict())
    if differences:
        advice = (
            "the file is inconsistent; use another checkpoint" if weights.arch else "set --arch to its architecture"
        )
        raise UserError(
            f"--checkpoint {path}: the weights do not match {arch} with {weights.num_classes} classes",
            f"{differences}; {advice}",
        )
    net: nn.Module = classifier.build(arch, weights.num_classes)
    if weights.blurpool:
        surgery.blur_before_strides(net)
    set_weights(net, weights.state)
    broken = [name for name, value in net.state_dict().items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(
            f"--checkpoint {path}: some weights are NaN or inf: {some(broken)}",
            "the training diverged, or the file is damaged; use another checkpoint",
        )
    return Classifier(net, weights.mean, weights.std)


def set_weights(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a state into a network of the same names; some networks' `load_state_dict` also needs a version entry."""
    for name, value in net.state_dict().items():
        value.copy_(state[name])


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Tensors that are missing, unexpected, of another shape or type: the first names of each; empty if none."""
    both = [name for name in expected if name in found]
    kinds = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}"
            for name in both
            if found[name].shape != expected[name].shape
        ],
        "of another type": [
            f"{name} {found[name].dtype} instead of {expected[name].dtype}"
            for name in both
            if found[name].dtype not in (_FLOATS if expected[name].dtype in _FLOATS else (expected[name].dtype,))
        ],
    }
    return "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in kinds.items() if names)
