"""Checkpoints are written atomically, and read without running code, whatever their source."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor

from fast_spatial.config.fields import to_json
from fast_spatial.config.train import TrainConfig
from fast_spatial.errors import UserError
from fast_spatial.models import checkpoint
from fast_spatial.models.checkpoint import build_classifier, load, read_weights
from fast_spatial.models.classifier import IMAGENET_MEAN, IMAGENET_STD
from fast_spatial.training.checkpoints import Saver

SMALL = "shufflenet_v2_x0_5"
State = dict[str, Tensor]


def numbered_state(arch: str, num_classes: int) -> State:
    """torchvision's state dict of an architecture, every tensor filled with its position."""
    with torch.device("meta"):
        state = torchvision.models.get_model(arch, num_classes=num_classes).state_dict()
    return {
        name: torch.full(tensor.shape, number, dtype=tensor.dtype)
        for number, (name, tensor) in enumerate(state.items(), 1)
    }


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# --- writing


def save(path: Path, payload: dict[str, Any]) -> None:
    saver = Saver(path.parent)
    saver.save(payload)
    saver.wait()


def test_what_is_saved_is_what_is_loaded(tmp_path):
    payload: dict[str, Any] = {
        "model": {"w": torch.randn(3, 4), "n": torch.tensor(7)},
        "epoch": 3,
        "best": 1.5,
        "classes": ["a", "b"],
    }
    save(tmp_path / "last.pt", payload)
    found = load(tmp_path / "last.pt")
    assert_same(found["model"], payload["model"])
    assert {k: v for k, v in found.items() if k != "model"} == {"epoch": 3, "best": 1.5, "classes": ["a", "b"]}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_state_of_an_optimizer_survives(tmp_path):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save(tmp_path / "last.pt", {"optimizer": optimizer.state_dict()})
    found = load(tmp_path / "last.pt")["optimizer"]
    assert torch.equal(found["state"][0]["momentum_buffer"], torch.ones(2, 2))
    assert found["param_groups"] == optimizer.state_dict()["param_groups"]


def disk_full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    save(tmp_path / "last.pt", {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else Path, call, disk_full)
        with pytest.raises(UserError, match=r"No space left on device.*the earlier last.pt is intact"):
            save(tmp_path / "last.pt", {"epoch": 2})
    assert load(tmp_path / "last.pt") == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


def test_something_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path):
    save(tmp_path / "last.pt", {"epoch": 1})
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save(tmp_path / "last.pt", {"weights": torch.zeros(1000), "function": lambda: None})
    assert load(tmp_path / "last.pt") == {"epoch": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


# --- reading


def assert_normalizes(classifier, mean, std):
    views = torch.arange(48, dtype=torch.uint8).mul(5).view(1, 4, 4, 3)
    unit = views.permute(0, 3, 1, 2) / 255
    expected = (unit - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for images in (views, unit):
        torch.testing.assert_close(classifier.normalize(images), expected)


def test_ours_says_everything_about_itself(tmp_path):
    state = numbered_state(SMALL, 3)
    config = to_json(TrainConfig(data="d", out="o", mode="random", arch=SMALL, image_size=64))
    content = {"format": "fast_spatial 1", "model": state, "arch": SMALL, "classes": ["a", "b", "c"], "config": config}
    weights = read_weights(write(tmp_path / "best.pt", content))
    assert (weights.arch, weights.classes, weights.num_classes, weights.side) == (SMALL, ("a", "b", "c"), 3, 64)
    assert_same(weights.state, state)
    classifier = build_classifier(tmp_path / "best.pt", weights, "")
    assert_same(classifier.net.state_dict(), state)
    assert_normalizes(classifier, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def original_form(state: State) -> dict[str, Any]:
    """A checkpoint as the original code writes it: DataParallel around an attacker model around the network."""
    normalizer = {"new_mean": torch.tensor([0.1, 0.2, 0.3]), "new_std": torch.tensor([0.4, 0.5, 0.6])}
    numbers = {f"normalizer.{name}": value.view(3, 1, 1) for name, value in normalizer.items()}
    network = {f"model.{name}": tensor for name, tensor in state.items()}
    attacker = {f"attacker.{name}": torch.zeros_like(tensor) for name, tensor in {**numbers, **network}.items()}
    wrapped = {f"module.{name}": tensor for name, tensor in {**numbers, **network, **attacker}.items()}
    return {"model": wrapped, "optimizer": {"state": {}, "param_groups": []}, "schedule": None, "epoch": 109}


def test_the_original_codes_form_is_read_with_its_normalization(tmp_path):
    state = numbered_state("resnet18", 1000)
    weights = read_weights(write(tmp_path / "checkpoint.pt.best", original_form(state)))
    assert (weights.arch, weights.classes, weights.side) == (None, None, None)
    classifier = build_classifier(tmp_path / "checkpoint.pt.best", weights, "")
    assert_same(classifier.net.state_dict(), state)
    assert_normalizes(classifier, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def test_a_normalization_of_the_files_own_changes_the_logits(tmp_path):
    weights = read_weights(write(tmp_path / "original.pt", original_form(numbered_state(SMALL, 3))))
    classifier = build_classifier(tmp_path / "original.pt", weights, SMALL)
    gray = torch.full((1, 3, 1, 1), 0.5)
    assert classifier.normalize(gray).flatten().tolist() == pytest.approx([0.4 / 0.4, 0.3 / 0.5, 0.2 / 0.6])


FORMS: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "under state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "under model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "data parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "data parallel under state_dict": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("arch", "num_classes"), [(SMALL, 3), ("squeezenet1_1", 7)])
def test_plain_state_dicts_are_read(tmp_path, form, arch, num_classes):
    state = numbered_state(arch, num_classes)
    weights = read_weights(write(tmp_path / "weights.pt", FORMS[form](state)))
    classifier = build_classifier(tmp_path / "weights.pt", weights, arch)
    assert_same(classifier.net.state_dict(), state)


def test_the_order_of_a_state_dict_does_not_matter(tmp_path):
    state = numbered_state("resnet18", 10)
    weights = read_weights(write(tmp_path / "weights.pt", dict(sorted(state.items()))))
    assert_same(build_classifier(tmp_path / "weights.pt", weights, "").net.state_dict(), state)


def test_safetensors_are_read(tmp_path):
    path = tmp_path / "weights.safetensors"
    state = numbered_state(SMALL, 3)
    save_file(state, path)
    assert_same(build_classifier(path, read_weights(path), SMALL).net.state_dict(), state)


def test_a_classifier_computes_with_the_weights_of_the_file(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.get_model(SMALL, num_classes=3).eval()
    path = write(tmp_path / "weights.pt", net.state_dict())
    classifier = build_classifier(path, read_weights(path), SMALL).eval()
    images = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    with torch.no_grad():
        expected = net((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        torch.testing.assert_close(classifier(images), expected, rtol=1e-4, atol=1e-4)


# --- refusing


class Canary:
    """An object whose pickle creates a file when it is loaded unsafely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "pickle", "legacy torch.save"])
@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.pt.best", "evil.safetensors"])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path, how, name):
    content, path = {"model": Canary(tmp_path / "ran")}, tmp_path / name
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch.save")
    with pytest.raises(UserError, match=f"^--checkpoint {path}: ") as caught:
        read_weights(path)
    assert not (tmp_path / "ran").exists()
    assert len(str(caught.value).splitlines()) <= 2


def test_the_canary_would_run_in_a_careless_reader(tmp_path):
    path = write(tmp_path / "evil.pt", {"model": Canary(tmp_path / "ran")})
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickled_module_is_refused_in_our_words_without_advice_to_run_it(tmp_path, protocol, recwarn):
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), path, pickle_protocol=protocol)
    with pytest.raises(UserError, match="--checkpoint") as caught:
        load(path)
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "two options" not in str(caught.value)
    assert list(recwarn) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor, not a dictionary of tensors"),
        ([torch.zeros(3)], "holds a list, not a dictionary of tensors"),
        ({}, "no classifier weights found"),
        ({"model": {}, "epoch": 3}, r"no classifier weights found \(keys: model, epoch\)"),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, r"no classifier weights found \(keys: a, b, c and 1 more\)"),
        ({0: torch.zeros(3)}, "no classifier weights found"),
        ({"steps": torch.zeros(3, dtype=torch.int64)}, "no classifier weights found"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(tmp_path, content, message):
    path = write(tmp_path / "file.pt", content)
    with pytest.raises(UserError, match=f"^--checkpoint {path}: {message}"):
        read_weights(path)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"is a folder\ngive a file, such as best\.pt in a run's folder"):
        checkpoint.load(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path / "whole.pt", {"w": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"^--checkpoint {path}: unsafe or damaged checkpoint"):
        load(path)


def test_weights_of_another_architecture_list_the_first_differences(tmp_path):
    path = write(tmp_path / "weights.pt", numbered_state("resnet18", 10))
    with pytest.raises(UserError, match="the weights do not match resnet34 with 10 classes\n") as caught:
        build_classifier(path, read_weights(path), "resnet34")
    advice = str(caught.value).splitlines()[1]
    assert advice == (
        "96 missing: layer1.2.conv1.weight, layer1.2.bn1.weight, layer1.2.bn1.bias and 93 more; "
        "set --arch to its architecture"
    )


def test_weights_of_another_shape_and_ones_too_many_are_listed(tmp_path):
    state = numbered_state("resnet18", 10)
    wide = {
        **state,
        "conv1.weight": torch.zeros(64, 1, 7, 7),
        "head.weight": torch.zeros(1),
        "fc2.weight": torch.zeros(1),
    }
    path = tmp_path / "weights.pt"
    with pytest.raises(UserError, match="the weights do not match resnet18 with 10 classes") as caught:
        build_classifier(path, checkpoint.Weights(wide, 10), "")
    listed = (
        "2 unexpected: head.weight, fc2.weight; "
        "1 of another shape: conv1.weight [64, 1, 7, 7] instead of [64, 3, 7, 7]; "
    )
    assert str(caught.value).splitlines()[1].startswith(listed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    state = numbered_state(SMALL, 3)
    state["conv5.1.running_var"] = torch.full((1024,), value)
    path = write(tmp_path / "weights.pt", state)
    with pytest.raises(UserError, match=f"^--checkpoint {path}: some weights are NaN or inf"):
        build_classifier(path, read_weights(path), SMALL)


def test_an_architecture_that_contradicts_the_file_is_refused(tmp_path):
    weights = checkpoint.Weights(numbered_state(SMALL, 3), 3, arch=SMALL)
    with pytest.raises(UserError, match=f"contains a {SMALL}, but --arch is resnet18\nremove --arch"):
        build_classifier(tmp_path / "best.pt", weights, "resnet18")
