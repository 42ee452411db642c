"""A model for other programs: torchvision's state dict as safetensors, and a network as ONNX; both read back.

The safetensors file holds torchvision's parameter names, so that any program that builds the architecture can load it.
The ONNX file is one file without others beside it. It takes RGB images in [0, 1] and normalizes by itself: who deploys
a model should not have to know numbers that only its training knew (and the original code's are not ImageNet's).
The metadata of both say the architecture, the classes, the side, the mean and the standard deviation.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fast_spatial.config.commands import ExportConfig
from fast_spatial.errors import UserError
from fast_spatial.models import checkpoint
from fast_spatial.models.classifier import Classifier
from fast_spatial.runtime.files import write_atomically

BATCH_SIZES = (1, 5)  # of the images whose logits are compared
TOLERANCE = 1e-4  # largest difference of logits, as a share of the largest logit; float32 rounding stays below 1e-5
ONNX_LIMIT_BYTES = 2**31 - 2**20  # of a protobuf message, which the weights are a part of


def find_onnx() -> ModuleType:
    """Onnxruntime, if what an export to ONNX takes is installed.

    Raises:
        UserError: naming what is missing.

    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--onnx: it needs the package {error.name}, which is not installed", "pip install -e .[export]"
        ) from None
    runtime: ModuleType = onnxruntime
    return runtime


def load_model(config: ExportConfig) -> tuple[Classifier, str, int, dict[str, str]]:
    """What is exported, validated: the model, its architecture, the side of its images, and the files' metadata.

    Raises:
        UserError: on a checkpoint that cannot be read, or does not fit the architecture or one ONNX file.

    """
    path = Path(config.checkpoint)
    weights = checkpoint.read_weights(path)
    model = checkpoint.build_classifier(path, weights, config.arch).eval()
    if config.safetensors and weights.blurpool:
        raise UserError(
            f"--safetensors {config.safetensors}: the network has BlurPool, which others would build the "
            f"{weights.arch} without",
            "use --onnx",
        )
    held = sum(value.nbytes for value in model.net.state_dict().values())
    if config.onnx and held > ONNX_LIMIT_BYTES:
        raise UserError(
            f"--onnx {config.onnx}: the weights take {held / 1e9:.2g} GB, and one ONNX file holds 2",
            "use --safetensors",
        )
    arch, side = config.arch or weights.arch or checkpoint.DEFAULT_ARCH, config.image_size or weights.side or 224
    values = {"classes": weights.classes, "side": side, "mean": weights.mean, "std": weights.std}
    about = {name: json.dumps(value) for name, value in values.items()}
    return model, arch, side, {"format": checkpoint.FORMAT, "arch": arch, **about}


def export_checkpoint(config: ExportConfig) -> None:
    """Write the files that were asked for, and say how far their logits are from the checkpoint's.

    Raises:
        UserError: if a file does not give the checkpoint's logits; it is not left behind.

    """
    model, arch, side, about = load_model(config)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(size, 3, side, side, generator=generator) for size in BATCH_SIZES]
    with torch.no_grad():
        expected = [model(images) for images in batches]
    if config.safetensors:
        data = to_safetensors(model, about)
        _write_verified("--safetensors", Path(config.safetensors), data, read_safetensors, batches, expected)
    if config.onnx:
        try:
            data = to_onnx(model, side, about)
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0][:100]  # its own text is about PyTorch
            raise UserError(
                f"--onnx {config.onnx}: torch cannot export a {arch}: {reason}", "use --safetensors"
            ) from None
        _write_verified("--onnx", Path(config.onnx), data, read_onnx, batches, expected)


def to_safetensors(model: Classifier, about: dict[str, str]) -> bytes:
    """The state dict of torchvision's network, with metadata."""
    from safetensors.torch import save

    data: bytes = save({name: value.contiguous() for name, value in model.net.state_dict().items()}, about)
    return data


def to_onnx(model: Classifier, side: int, about: dict[str, str]) -> bytes:
    """A network from `images`, float32 [N, 3, side, side] in [0, 1], to `logits`, float32 [N, K], for any N."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about the exporter's own parts
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, side, side),),  # torch.export takes a batch of 1 for a constant
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.metadata_props.update(about | {"input": "RGB images in [0, 1]; the network normalizes them"})
    data: bytes = program.model_proto.SerializeToString()
    return data


def read_safetensors(path: Path) -> Callable[[Tensor], Tensor]:
    """From images to the logits of a fresh network with a file's weights."""
    return checkpoint.build_classifier(path, checkpoint.read_weights(path), "").eval()


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """From images to logits, through onnxruntime on the CPU."""
    runtime = find_onnx()
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_verified(
    flag: str,
    path: Path,
    data: bytes,
    read: Callable[[Path], Callable[[Tensor], Tensor]],
    batches: list[Tensor],
    expected: list[Tensor],
) -> None:
    """Write a file under its name once its logits are right, else not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / path.name
            write_atomically(draft, lambda file: file.write(data))
            difference, largest = _compare(draft, read, batches, expected)
            draft.rename(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: it cannot be written: {error.strerror}", "name a file elsewhere") from None
    except _Fault as fault:
        raise UserError(
            f"{flag} {path}: not written, since {fault}",
            "this is a fault of this program or its packages, not of the checkpoint",
        ) from None
    print(
        f"{path}: {len(data) / 1e6:.1f} MB; over {sum(BATCH_SIZES)} random images, its logits differ by at most "
        f"{difference:.2g} from the checkpoint's, of which the largest is {largest:.2g}"
    )


class _Fault(Exception):
    """What was written is not what was meant."""


def _compare(
    draft: Path, read: Callable[[Path], Callable[[Tensor], Tensor]], batches: list[Tensor], expected: list[Tensor]
) -> tuple[float, float]:
    """The largest difference of logits between a file and the checkpoint, and the checkpoint's largest logit."""
    try:
        network = read(draft)
        with torch.no_grad():
            found = [network(images) for images in batches]
    except Exception as error:  # the reader's own, of many kinds
        reason = str(error).strip().splitlines()[0].replace(str(draft), draft.name)[:100]
        raise _Fault(f"it cannot be read back: {reason}") from None
    difference = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
    largest = max(float(logits.abs().max()) for logits in expected)
    if not difference <= TOLERANCE * largest:
        raise _Fault(
            f"its logits differ by up to {difference:.2g} from the checkpoint's, of which the largest is {largest:.2g}"
        )
    return difference, largest
