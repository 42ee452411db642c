"""Exported files reproduce the checkpoint's logits in other programs, or are not written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fast_spatial import commands
from fast_spatial.models import checkpoint, classifier, export
from tests.config.test_cli import refused

CLASSES = [str(digit) for digit in range(10)]
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)  # of a file in the original code's form


def digits(count: int) -> tuple[Tensor, Tensor]:
    """Real images, [N, 3, 32, 32] in [0, 1], and their labels."""
    bunch = load_digits()
    small = torch.from_numpy(bunch.images[:count]).float().unsqueeze(1) / 16
    return nn.functional.interpolate(small, size=32).expand(-1, 3, -1, -1).contiguous(), torch.tensor(
        bunch.target[:count]
    )


@pytest.fixture(scope="module", autouse=True)
def fresh_process():
    """Reset TF32, as in a new process: torch cannot export after an evaluation has turned TF32 off."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A checkpoint of a ResNet-18 after a few training steps on the digits."""
    torch.manual_seed(0)
    model = classifier.Classifier(classifier.build("resnet18", 10)).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # its statistics follow in a few steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = digits(320)
    for step in range(10):
        part = slice(32 * step, 32 * step + 32)
        nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    content = {"format": checkpoint.FORMAT, "arch": "resnet18", "classes": CLASSES, "config": {"side": 32}}
    path: Path = tmp_path_factory.mktemp("trained") / "best.pt"
    torch.save({**content, "model": model.net.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    """A folder with m.safetensors and m.onnx of the trained model."""
    folder: Path = tmp_path_factory.mktemp("exported")
    files = ["--safetensors", str(folder / "m.safetensors"), "--onnx", str(folder / "m.onnx")]
    assert commands.main(["export", "--checkpoint", str(trained), *files]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["m.onnx", "m.safetensors"]
    return folder


@pytest.fixture
def original(tmp_path) -> Path:
    """A file in the original code's form, with a normalization of its own."""
    torch.manual_seed(0)
    numbers = {"new_mean": torch.tensor(MEAN).view(3, 1, 1), "new_std": torch.tensor(STD).view(3, 1, 1)}
    wrapped = {f"module.normalizer.{name}": value for name, value in numbers.items()}
    state = torchvision.models.squeezenet1_1(num_classes=10).state_dict()
    path: Path = tmp_path / "o.pt"
    torch.save({"model": wrapped | {f"module.model.{name}": value for name, value in state.items()}}, path)
    return path


def run_onnx(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("count", [1, 5])
def test_the_onnx_network_gives_the_checkpoints_logits_of_real_images(trained, exported, count):
    images, labels = digits(count)
    net = torchvision.models.resnet18(num_classes=10).eval()
    net.load_state_dict(torch.load(trained, weights_only=True)["model"])
    mean, std = torch.tensor(classifier.IMAGENET_MEAN), torch.tensor(classifier.IMAGENET_STD)
    with torch.no_grad():
        expected = net((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    found = run_onnx(exported / "m.onnx", images)
    assert found.shape == (count, 10)
    assert (found.argmax(1) == labels).float().mean() >= 0.8  # it has learnt something
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_the_onnx_file_is_one_file_that_says_what_it_takes_and_nothing_of_this_machine(exported):
    found = onnx.load(exported / "m.onnx", load_external_data=False)
    onnx.checker.check_model(found)
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in found.graph.initializer)
    ((images,), (logits,)) = (
        [[axis.dim_value or axis.dim_param for axis in value.type.tensor_type.shape.dim] for value in values]
        for values in (found.graph.input, found.graph.output)
    )
    assert images[1:] == [3, 32, 32] and logits[1:] == [10]
    assert images[0] == logits[0] and isinstance(images[0], str)
    about = {entry.key: entry.value for entry in found.metadata_props}
    assert (about["arch"], about["side"], json.loads(about["classes"])) == ("resnet18", "32", CLASSES)
    assert about["input"] == "RGB images in [0, 1]; the network normalizes them"
    assert str(Path(torch.__file__).parent).encode() not in (exported / "m.onnx").read_bytes()


def test_the_safetensors_file_is_torchvisions_state_dict_with_metadata(trained, exported):
    state = load_file(exported / "m.safetensors")
    torchvision.models.resnet18(num_classes=10).load_state_dict(state)  # strict
    saved = torch.load(trained, weights_only=True)["model"]
    assert all(torch.equal(state[name], saved[name]) for name in saved)
    with safe_open(exported / "m.safetensors", framework="pt") as file:
        about = file.metadata()
    assert about == {
        "format": "fast_spatial 1",
        "arch": "resnet18",
        "classes": json.dumps(CLASSES),
        "side": "32",
        "mean": "[0.485, 0.456, 0.406]",
        "std": "[0.229, 0.224, 0.225]",
    }


def test_an_exported_file_is_a_checkpoint_that_knows_what_it_was(exported):
    weights = checkpoint.read_weights(exported / "m.safetensors")
    assert (weights.arch, weights.classes, weights.side) == ("resnet18", tuple(CLASSES), 32)


def test_the_original_codes_normalization_goes_along(original, tmp_path, capsys):
    files = ["--safetensors", str(tmp_path / "deep" / "o.safetensors"), "--onnx", str(tmp_path / "o.onnx")]
    words = ["export", "--checkpoint", str(original), *files, "--arch", "squeezenet1_1", "--image-size", "32"]
    assert commands.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [files[1], files[3]]
    assert "its logits differ by at most 0 from the checkpoint's" in lines[0]
    weights = checkpoint.read_weights(tmp_path / "deep" / "o.safetensors")
    assert (weights.classes, weights.num_classes, weights.side) == (None, 10, 32)
    assert weights.mean == pytest.approx(MEAN) and weights.std == pytest.approx(STD)
    images, _ = digits(2)
    net = checkpoint.build_classifier(tmp_path / "o", weights, "").net.eval()
    with torch.no_grad():
        expected = net((images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    torch.testing.assert_close(run_onnx(tmp_path / "o.onnx", images), expected, rtol=1e-4, atol=1e-5)


def shifted(data: bytes) -> bytes:
    """An ONNX network whose first output is larger by 1."""
    found = onnx.load_from_string(data)
    (bias,) = (tensor for tensor in found.graph.initializer if tensor.name.endswith("fc.bias"))
    values = onnx.numpy_helper.to_array(bias) + np.eye(1, 10, dtype=np.float32)[0]
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    changed: bytes = found.SerializeToString()
    return changed


def of_other_weights(model: classifier.Classifier, about: dict[str, str]) -> bytes:
    data: bytes = save({name: 2 * value.contiguous() for name, value in model.net.state_dict().items()}, about)
    return data


@pytest.mark.parametrize("kind", ["onnx", "safetensors"])
@pytest.mark.parametrize("fault", ["other numbers", "garbage"])
def test_a_file_that_would_be_wrong_is_not_left_behind(trained, exported, tmp_path, monkeypatch, capsys, kind, fault):
    right = (exported / "m.onnx").read_bytes()
    wrong: dict[tuple[str, str], Any] = {
        ("onnx", "other numbers"): lambda *_: shifted(right),
        ("safetensors", "other numbers"): of_other_weights,
    }
    monkeypatch.setattr(export, f"to_{kind}", wrong.get((kind, fault), lambda *_: b"garbage"))
    target = tmp_path / f"m.{kind}"
    lines = refused(capsys, "export", "--checkpoint", str(trained), f"--{kind}", str(target))
    what = "its logits differ by up to" if fault == "other numbers" else "it cannot be read back"
    assert lines[0].startswith(f"launch.py: --{kind} {target}: not written: {what}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_before_anything_is_written(trained, tmp_path, monkeypatch, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    files = ["--safetensors", str(tmp_path / "m.safetensors"), "--onnx", str(tmp_path / "m.onnx")]
    assert refused(capsys, "export", "--checkpoint", str(trained), *files) == [
        f"launch.py: --onnx: the package {missing} is not installed",
        "pip install -e .[export]",
    ]
    assert list(tmp_path.iterdir()) == []
    assert commands.main(["export", "--checkpoint", str(trained), *files[:2]]) == 0


def test_nothing_is_overwritten(trained, tmp_path, capsys):
    target = tmp_path / "m.safetensors"
    target.write_bytes(b"precious")
    lines = refused(capsys, "export", "--checkpoint", str(trained), "--safetensors", str(target))
    assert lines == [
        f"launch.py: --safetensors {target}: file exists",
        "remove it, or name another file",
    ]
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--onnx", "file/m.onnx"], "file is a file, not a folder"),
        (["--onnx", "folder.onnx"], "--onnx folder.onnx: that is a folder"),
        (["--onnx", "m.onnx", "--arch", "resnet34"], "contains a resnet18, but --arch is resnet34"),
        (["--onnx", "m.onnx", "--image-size", "5000"], "--image-size 5000: must be at most 4096"),
        (["--onnx", "m.onnx", "--checkpoint", "gone.pt"], "--checkpoint gone.pt: file not found"),
    ],
)
def test_what_cannot_be_exported_is_refused(trained, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.onnx").mkdir()
    given = [] if "--checkpoint" in words else ["--checkpoint", str(trained)]
    assert expected in refused(capsys, "export", *given, *words)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.onnx"]


def test_a_network_that_torch_cannot_export_is_refused_with_the_reason(trained, tmp_path, monkeypatch, capsys):
    def fail(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("\x1b[96mstep 1\nfile an issue") from RuntimeError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    target = tmp_path / "m.onnx"
    assert refused(capsys, "export", "--checkpoint", str(trained), "--onnx", str(target)) == [
        f"launch.py: --onnx {target}: torch cannot export a resnet18: no such operator",
        "use --safetensors",
    ]


def test_a_full_disk_ends_in_two_lines_and_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_atomically", full)
    target = tmp_path / "m.safetensors"
    lines = refused(capsys, "export", "--checkpoint", str(trained), "--safetensors", str(target))
    assert lines[0] == f"launch.py: --safetensors {target}: cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_images_too_small_for_the_network_are_refused(original, tmp_path, capsys):
    words = ["--checkpoint", str(original), "--arch", "squeezenet1_1", "--image-size", "4"]
    line = refused(capsys, "export", *words, "--safetensors", str(tmp_path / "m.safetensors"))[0]
    assert line.startswith("launch.py: --arch squeezenet1_1 cannot take views of --image-size 4: ")


def test_weights_that_one_onnx_file_cannot_hold_are_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "ONNX_LIMIT_BYTES", 40_000_000)
    lines = refused(capsys, "export", "--checkpoint", str(trained), "--onnx", str(tmp_path / "m.onnx"))
    assert lines[0].endswith("m.onnx: the weights take 0.045 GB; an ONNX file holds at most 2 GB")
    assert lines[1] == "use --safetensors"
