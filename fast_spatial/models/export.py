"""Export to safetensors (torchvision's state dict) and ONNX; each file is reloaded and verified before it is kept.

The safetensors file has torchvision's parameter names, so any program that builds the architecture can load it. The
ONNX model is a single file. It takes RGB images in [0, 1] and normalizes them itself, since the mean and deviation
belong to the training (the original code's are not ImageNet's). The metadata of both files hold the architecture, the
classes, the image size, the mean and the standard deviation.
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

BATCH_SIZES = (1, 5)  # batches of random images for the comparison of logits
TOLERANCE = 1e-4  # largest difference of logits relative to the largest logit; float32 rounding is below 1e-5
ONNX_LIMIT_BYTES = 2**31 - 2**20  # for the weights; a protobuf message holds at most 2 GiB


def find_onnx() -> ModuleType:
    """Return onnxruntime, if all packages for an export to ONNX are installed.

    Raises:
        UserError: naming the missing package.

    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--onnx: the package {error.name} is not installed", "pip install -e .[export]") from None
    runtime: ModuleType = onnxruntime
    return runtime


def load_model(config: ExportConfig) -> tuple[Classifier, str, int, dict[str, str]]:
    """The validated model to export, its architecture, its image size, and the files' metadata.

    Raises:
        UserError: if the checkpoint cannot be read, or does not fit the architecture or a single ONNX file.

    """
    path = Path(config.checkpoint)
    weights = checkpoint.read_weights(path)
    model = checkpoint.build_classifier(path, weights, config.arch).eval()
    if config.safetensors and weights.blurpool:
        raise UserError(
            f"--safetensors {config.safetensors}: the network has BlurPool, which torchvision's {weights.arch} does "
            "not have",
            "use --onnx",
        )
    held = sum(value.nbytes for value in model.net.state_dict().values())
    if config.onnx and held > ONNX_LIMIT_BYTES:
        raise UserError(
            f"--onnx {config.onnx}: the weights take {held / 1e9:.2g} GB; an ONNX file holds at most 2 GB",
            "use --safetensors",
        )
    arch, side = config.arch or weights.arch or checkpoint.DEFAULT_ARCH, config.image_size or weights.side or 224
    values = {"classes": weights.classes, "side": side, "mean": weights.mean, "std": weights.std}
    about = {name: json.dumps(value) for name, value in values.items()}
    return model, arch, side, {"format": checkpoint.FORMAT, "arch": arch, **about}


def export_checkpoint(config: ExportConfig) -> None:
    """Write the requested files, and print how far their logits differ from the checkpoint's.

    Raises:
        UserError: if a file does not reproduce the checkpoint's logits; the file is removed.

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
            reason = str(error.__cause__ or error).strip().splitlines()[0][:100]  # the outer error is generic
            raise UserError(
                f"--onnx {config.onnx}: torch cannot export a {arch}: {reason}", "use --safetensors"
            ) from None
        _write_verified("--onnx", Path(config.onnx), data, read_onnx, batches, expected)


def to_safetensors(model: Classifier, about: dict[str, str]) -> bytes:
    """A safetensors file of torchvision's state dict, with metadata."""
    from safetensors.torch import save

    data: bytes = save({name: value.contiguous() for name, value in model.net.state_dict().items()}, about)
    return data


def to_onnx(model: Classifier, side: int, about: dict[str, str]) -> bytes:
    """An ONNX file that maps `images`, float32 [N, 3, side, side] in [0, 1], to `logits`, float32 [N, K], for any N."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's internal warnings
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, side, side),),  # torch.export would treat a batch size of 1 as a constant
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with local paths
    program.model.metadata_props.update(about | {"input": "RGB images in [0, 1]; the network normalizes them"})
    data: bytes = program.model_proto.SerializeToString()
    return data


def read_safetensors(path: Path) -> Callable[[Tensor], Tensor]:
    """A function from images to logits: a new network with a file's weights."""
    return checkpoint.build_classifier(path, checkpoint.read_weights(path), "").eval()


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """A function from images to logits: onnxruntime on the CPU."""
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
    """Write a temporary file, and rename it to `path` if its logits are correct."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            draft = Path(folder) / path.name
            write_atomically(draft, lambda file: file.write(data))
            difference, largest = _compare(draft, read, batches, expected)
            draft.rename(path)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {error.strerror}", "choose another folder") from None
    except _Fault as fault:
        raise UserError(
            f"{flag} {path}: not written: {fault}",
            "this is a bug in this program or its packages, not in the checkpoint",
        ) from None
    print(
        f"{path}: {len(data) / 1e6:.1f} MB; on {sum(BATCH_SIZES)} random images, its logits differ by at most "
        f"{difference:.2g} from the checkpoint's (largest logit: {largest:.2g})"
    )


class _Fault(Exception):
    """A written file that does not match the checkpoint."""


def _compare(
    draft: Path, read: Callable[[Path], Callable[[Tensor], Tensor]], batches: list[Tensor], expected: list[Tensor]
) -> tuple[float, float]:
    """The largest difference between a file's logits and the checkpoint's, and the checkpoint's largest logit."""
    try:
        network = read(draft)
        with torch.no_grad():
            found = [network(images) for images in batches]
    except Exception as error:  # readers raise many types
        reason = str(error).strip().splitlines()[0].replace(str(draft), draft.name)[:100]
        raise _Fault(f"it cannot be read back: {reason}") from None
    difference = max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))
    largest = max(float(logits.abs().max()) for logits in expected)
    if not difference <= TOLERANCE * largest:
        raise _Fault(
            f"its logits differ by up to {difference:.2g} from the checkpoint's (largest logit: {largest:.2g})"
        )
    return difference, largest
