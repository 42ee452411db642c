"""Checks before a process is started or a file is written.

Functions import modules that need torch or numba themselves, since the doctor must work where these are broken.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from fast_spatial.config.commands import (
    SYNTHETIC,
    BenchConfig,
    CheckConfig,
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    LandscapeConfig,
    ReportConfig,
)
from fast_spatial.config.fields import differences, flag, identity, to_json, todays_names
from fast_spatial.config.recipes import recipe_as_typed
from fast_spatial.config.train import LaunchOptions, TrainConfig
from fast_spatial.data.placing import choose_placement
from fast_spatial.errors import UserError
from fast_spatial.runtime.files import check_writable, write_json
from fast_spatial.runtime.run_files import (
    BEST,
    CALIBRATION,
    CONFIG,
    LANDSCAPE,
    LAST,
    LOG,
    PLAN,
    PREVIOUS,
    REPORT,
    USAGE,
)

# torchrun's own; packages may add more.
RDZV_BACKENDS = ("c10d", "static", "etcd", "etcd-v2")


def check_train(config: TrainConfig) -> None:
    """Raise a UserError if this training cannot work, or would mix with another run."""
    from fast_spatial.pipelines.dataset import check_divides

    processes = check_launch(config)
    _check_data(config)
    check_divides(config.global_batch_size, processes)
    per_process = config.global_batch_size // processes
    if config.grad_accum_steps > per_process:
        raise UserError(
            f"--grad-accum-steps {config.grad_accum_steps}: exceeds the local batch of {per_process} images",
            "lower --grad-accum-steps",
        )
    if config.bn_group_size and per_process % (config.grad_accum_steps * config.bn_group_size):
        raise UserError(
            f"--bn-group-size {config.bn_group_size}: must divide the local batch of {per_process} images, "
            f"split into {config.grad_accum_steps} parts (--grad-accum-steps)"
        )
    if 0 < config.max_train_images < config.global_batch_size:
        raise UserError(
            f"--max-train-images {config.max_train_images}: less than one batch "
            f"(--global-batch-size {config.global_batch_size})",
            "lower --global-batch-size",
        )
    check_out(config)
    if config.replay:
        _check_replay(config)
    _check_model(config, per_process)


def check_bench(config: BenchConfig) -> None:
    """Raise a UserError if this benchmark cannot work."""
    from fast_spatial.data.images import data_folder
    from fast_spatial.pipelines.dataset import read_index

    check_writable("--json", config.json)
    if config.what == "gpu" and not gpu_count():
        raise UserError(
            "bench gpu: no GPU is visible", "run launch.py doctor for the cause, or choose another benchmark"
        )
    if config.data != SYNTHETIC:
        folder = data_folder(config.data)
        for split in ("train", "val") if config.what in ("pipeline", "all") else ("val",):
            read_index(folder, split)
    if config.read_latency_ms and not has_compiler("cc"):
        raise UserError("--read-latency-ms: no C compiler found", "install gcc")
    if config.ffcv_python and not Path(config.ffcv_python).is_file():
        raise UserError(f"--ffcv-python {config.ffcv_python}: no such file", "name a Python with FFCV")
    if config.checkpoint:
        from fast_spatial.evaluation.inputs import load_model_and_images

        load_model_and_images(
            EvaluateConfig(checkpoint=config.checkpoint, data=config.data, allow_partial_classes=True)
        )


def check_check_data(config: CheckConfig) -> None:
    """Raise a UserError if this check cannot work, would change the data folder, or overwrite a list of exclusions."""
    from fast_spatial.data.images import data_folder
    from fast_spatial.pipelines.dataset import list_classes

    folder = data_folder(config.data)
    check_writable("--json", config.json)
    listing = Path(config.write_exclusions)
    if config.write_exclusions and os.path.lexists(listing):
        raise UserError(f"--write-exclusions {listing}: file exists", "name a new file, or remove this one")
    for name in ("json", "write_exclusions"):
        written = getattr(config, name)
        if written and folder.resolve() in Path(written).resolve().parents:
            raise UserError(f"{flag(name)} {written}: must be outside the data folder", "name a file elsewhere")
    for split in config.splits:
        if (folder / split).is_dir():
            return
    list_classes(folder, config.splits[0])


def check_report(config: ReportConfig) -> None:
    """Raise a UserError if this report could not be written."""
    check_report_packages()
    check_writable("--out", str(Path(config.out or config.runs[0]) / REPORT))


def check_report_packages() -> None:
    """Raise a UserError if a package of the report is not installed; imports none of them."""
    missing = [name for name in ("matplotlib", "jinja2", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the report needs packages that are not installed: {', '.join(missing)}",
            f"install them: {sys.executable} -m pip install {' '.join(missing)}",
        )


def check_doctor(config: DoctorConfig) -> None:
    """Raise a UserError if the findings could not be written."""
    check_writable("--json", config.json)


def check_evaluate(config: EvaluateConfig) -> None:
    """Raise a UserError if this evaluation cannot work; reads the checkpoint and the folder's listing."""
    from fast_spatial.evaluation.inputs import load_model_and_images

    check_launch(config)
    check_writable("--json", config.json)
    load_model_and_images(config)


def check_landscape(config: LandscapeConfig) -> None:
    """Raise a UserError if this landscape cannot work; reads the checkpoint and the folder's listing."""
    from fast_spatial.evaluation.landscape import load_model_and_subset

    check_launch(config)
    check_writable("--out", str(Path(config.out) / LANDSCAPE))
    load_model_and_subset(config)


def check_export(config: ExportConfig) -> None:
    """Raise a UserError if this export cannot work; reads the checkpoint."""
    from fast_spatial.models import export

    for name in ("safetensors", "onnx"):
        file = getattr(config, name)
        check_writable(flag(name), file)
        if file and os.path.lexists(file):
            raise UserError(f"{flag(name)} {file}: file exists", "remove it, or name another file")
    if config.onnx:
        export.find_onnx()
    _, arch, side, _ = export.load_model(config)
    _check_size(arch, "image_size", side)


def check_launch(config: LaunchOptions) -> int:
    """The number of processes over all nodes; with an elastic number of nodes, the minimum."""
    try:
        nodes, most = (int(part) for part in (config.nnodes.split(":") * 2)[:2])
    except ValueError:
        nodes, most = 0, 0
    if not 1 <= nodes <= most or config.nnodes.count(":") > 1:
        raise UserError(f"--nnodes {config.nnodes}: expected a number, or MIN:MAX")
    if config.nnodes != "1" and not config.rdzv_endpoint:
        raise UserError(f"--nnodes {config.nnodes}: several nodes require --rdzv-endpoint HOST:PORT")
    if config.rdzv_endpoint:
        _check_rendezvous(config)
    gpus = gpu_count()
    if gpus and config.nproc_per_node > gpus:
        raise UserError(
            f"--nproc-per-node {config.nproc_per_node}: exceeds the {gpus} GPUs of this node, one process each"
        )
    if gpus and not has_compiler("cc"):
        raise UserError("no C compiler found; Triton needs one to launch its kernels on GPUs", "install gcc")
    choose_placement(config.decode, config.warp, on_gpu=gpus > 0, exact=False)
    if config.in_process and (config.nproc_per_node > 1 or config.nnodes != "1"):
        raise UserError("--in-process conflicts with several processes", "remove --nproc-per-node and --nnodes")
    return nodes * local_processes(config)


def _check_rendezvous(config: LaunchOptions) -> None:
    """Raise a UserError on a rendezvous that torchrun would answer with a ValueError."""
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    known = {*RDZV_BACKENDS, *(plugin.name for plugin in entry_points(group="torchrun.handlers"))}
    if config.rdzv_backend not in known:
        raise UserError(f"--rdzv-backend {config.rdzv_backend}: choose one of {', '.join(sorted(known))}")
    try:
        _, port = parse_rendezvous_endpoint(config.rdzv_endpoint, default_port=-1)
        if port < 0 and config.rdzv_backend == "static":  # the others have a default
            raise ValueError
    except ValueError:
        raise UserError(f"--rdzv-endpoint {config.rdzv_endpoint}: expected HOST:PORT") from None


def has_compiler(name: str) -> bool:
    """Whether Triton and torch.compile will find a compiler for C ("cc") or C++ ("c++")."""
    variable, names = {"cc": ("CC", ("gcc", "clang", "cc")), "c++": ("CXX", ("g++", "clang++", "c++"))}[name]
    return variable in os.environ or any(map(shutil.which, names))


def local_processes(config: LaunchOptions) -> int:
    """Processes on this node: --nproc-per-node, or one per GPU, or one."""
    return 1 if config.in_process else config.nproc_per_node or max(1, gpu_count())


def gpu_count() -> int:
    """Number of GPUs that torch finds."""
    import torch

    return torch.cuda.device_count()


def check_out(config: TrainConfig) -> None:
    """Raise a UserError unless --out is new, empty, or holds this run."""
    out = Path(config.out)
    # os.path's tests return False without permission to look; pathlib's may raise.
    nearest = next(folder for folder in (out, *out.absolute().parents) if os.path.exists(folder))
    if not os.path.isdir(nearest):
        raise UserError(f"--out {out}: {'this path' if nearest == out else nearest} is a file", "name a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: no permission to write to {nearest}", "name another folder")
    # Hidden files that another node is writing, and the files of a plan, do not make a run.
    if nearest != out or all(
        path.name.startswith(".") or path.name in (PLAN, CALIBRATION, USAGE) for path in out.iterdir()
    ):
        return
    try:
        stored: dict[str, Any] = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError
    except (OSError, ValueError):
        raise UserError(f"--out {out}: contains files, but no run of this program", "name a new folder") from None
    # CONFIG alone does not count: on several nodes, the first node writes it before the processes start.
    if config.resume == "never" and any((out / name).exists() for name in (LOG, LAST, PREVIOUS, BEST)):
        raise UserError(f"--out {out}: contains a run, and --resume never is set", "name a new folder")
    if changed := differences(todays_names(stored), identity(config)):
        raise UserError(f"--out {out}: contains a run with different settings ({changed})", "choose another folder")


def _check_replay(config: TrainConfig) -> None:
    """Raise a UserError unless the replayed training has the same settings."""
    from fast_spatial.training.run_folder import read_segments

    read_segments(config.replay)
    file = Path(config.replay) / CONFIG
    try:
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--replay {config.replay}: {file} cannot be read ({error})", "name the --out folder of a training"
        ) from None
    if changed := differences(todays_names(stored), identity(config)):
        raise UserError(
            f"--replay {config.replay}: contains a training with different settings ({changed})",
            f"repeat its flags, with --recipe {recipe_as_typed(str(stored.get('recipe')), stored.get('epochs', 0))}",
        )


def claim_out(config: TrainConfig) -> None:
    """Create the run's folder and write its configuration file, unless the file exists."""
    path = Path(config.out) / CONFIG
    if path.exists():
        return
    try:
        write_json(path, to_json(config))
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be written ({error.strerror})", "name another folder") from None


def _check_data(config: TrainConfig) -> None:
    from fast_spatial.data.images import data_folder, load_split
    from fast_spatial.pipelines.dataset import check_classes_agree, check_not_empty, count_images

    folder = data_folder(config.data)
    names = check_classes_agree(folder)
    for split in ("train", "val"):
        check_not_empty(folder, split, names)
    if config.max_classes > len(names):
        raise UserError(f"--max-classes {config.max_classes}: {config.data} has {len(names)} classes")
    if config.exclude:
        load_split(config.data, "val", exclude=config.exclude)
        found = len(load_split(config.data, "train", exclude=config.exclude, classes=config.max_classes))
    else:
        found = count_images(folder, "train", names[: config.max_classes or None], at_most=config.global_batch_size)
    if found < config.global_batch_size:
        raise UserError(
            f"--global-batch-size {config.global_batch_size}: {config.data} holds only {found} training images",
            "lower --global-batch-size",
        )


def _check_size(arch: str, name: str, side: int) -> None:
    import torch

    from fast_spatial.models import classifier

    net = classifier.shapes_of(arch, 10).eval()
    try:
        net(torch.empty(1, 3, side, side, device="meta"))
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"--arch {arch} cannot take views of {flag(name)} {side}: {reason}") from None


def _check_batch_norm(config: TrainConfig, per_process: int) -> None:
    """Raise a UserError if BatchNorm would get a single value per channel, which has no variance."""
    import torch

    from fast_spatial.models import classifier

    part = per_process // config.grad_accum_steps
    if min(part, config.bn_group_size or part) > 1:
        return
    name = "start_size" if config.start_size else "image_size"
    side = getattr(config, name)
    net = classifier.shapes_of(config.arch, 10).train()
    try:
        net(torch.empty(1, 3, side, side, device="meta"))
    except ValueError:  # torch's error for a single value per channel
        given = (
            "bn_group_size"
            if config.bn_group_size == 1
            else "grad_accum_steps"
            if config.grad_accum_steps > 1
            else "global_batch_size"
        )
        raise UserError(
            f"{flag(given)} {getattr(config, given)}: BatchNorm would get one value per channel "
            f"(one image, last maps of one pixel at {flag(name)} {side})",
            "raise --global-batch-size, lower --grad-accum-steps, or remove --bn-group-size",
        ) from None


def _check_model(config: TrainConfig, per_process: int) -> None:
    import torch

    from fast_spatial.training.optim import find_apex_sgd

    for name in ("start_size", "image_size", "eval_size"):
        if getattr(config, name):
            _check_size(config.arch, name, getattr(config, name))
    _check_batch_norm(config, per_process)
    if config.optimizer == "apex":
        find_apex_sgd()
    if config.compile == "true" and not gpu_count() and not has_compiler("c++"):
        raise UserError("--compile true: no C++ compiler found; CPUs need one", "install g++")
    if config.dtype == "float16" and not torch.cuda.is_available():
        raise UserError("--dtype float16: requires a GPU, and none is visible", "use float32 or bfloat16")
