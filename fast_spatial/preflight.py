"""What is checked before a process is started or a file written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fast_spatial.config import DIGITS, EvaluateConfig, LaunchOptions, TrainConfig, identity, to_json
from fast_spatial.data import data_folder
from pipelines.dataset import check_classes_agree, check_not_empty, list_classes
from pipelines.loader import check_divides

CONFIG = "config.json"


def check_train(config: TrainConfig) -> None:
    """Raise a ValueError if this training cannot work, or would mix with another run."""
    processes = check_launch(config)
    if config.data != DIGITS:
        _check_folder(config.data, config.classes)
    check_divides(config.global_batch_size, processes)
    per_process = config.global_batch_size // processes
    if config.accumulate > per_process:
        raise ValueError(f"--accumulate {config.accumulate}: each process has only {per_process} images of a batch")
    if config.bn_group and (per_process // config.accumulate) % config.bn_group:
        raise ValueError(
            f"--bn-group {config.bn_group}: it does not divide the {per_process // config.accumulate} images that are "
            f"normalized together"
        )
    if 0 < config.max_train_images < config.global_batch_size:
        raise ValueError(
            f"--max-train-images {config.max_train_images}: less than one batch; "
            f"lower --global-batch-size {config.global_batch_size}"
        )
    check_out(config)
    _check_model(config)


def check_evaluate(config: EvaluateConfig) -> None:
    """Raise a ValueError if this evaluation cannot work; reads the checkpoint and the folder's listing."""
    from fast_spatial.evaluate import prepare

    check_launch(config)
    if config.json and Path(config.json).is_dir():
        raise ValueError(f"--json {config.json}: that is a folder; name a file")
    prepare(config)


def check_launch(config: LaunchOptions) -> int:
    """The number of processes over all nodes (at the least, where nodes may come and go)."""
    try:
        nodes = int(config.nnodes.split(":")[0])
    except ValueError:
        nodes = 0
    if nodes < 1:
        raise ValueError(f"--nnodes {config.nnodes}: expected a number, or MIN:MAX")
    if config.nnodes != "1" and not config.rdzv_endpoint:
        raise ValueError(f"--nnodes {config.nnodes}: several nodes meet at --rdzv-endpoint HOST:PORT, which is missing")
    if config.stall_minutes <= 0:
        raise ValueError(f"--stall-minutes {config.stall_minutes:g}: it must be more than 0")
    gpus = gpu_count()
    if gpus and config.nproc_per_node > gpus:
        raise ValueError(f"--nproc-per-node {config.nproc_per_node}: this node has {gpus} GPUs, one process each")
    if config.in_process and (config.nproc_per_node > 1 or config.nnodes != "1"):
        raise ValueError("--in-process: it runs one process; leave --nproc-per-node and --nnodes away")
    return nodes * local_processes(config)


def local_processes(config: LaunchOptions) -> int:
    """Processes on this node: as asked for, or one per GPU, or one."""
    return 1 if config.in_process else config.nproc_per_node or max(1, gpu_count())


def gpu_count() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()


def check_out(config: TrainConfig) -> None:
    """Raise a ValueError if the run's folder holds something else than this run."""
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: that is a file; name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        stored: dict[str, Any] = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"--out {out}: it holds files, but no run of this program; name a new folder") from None
    mine = identity(config)
    differences = [
        f"{name} {stored.get(name)} there, {mine[name]} here" for name in mine if stored.get(name) != mine[name]
    ]
    if differences:
        raise ValueError(f"--out {out}: it holds another run ({'; '.join(differences[:4])})\nname a new folder")


def claim_out(config: TrainConfig) -> None:
    """Create the run's folder and write down whose it is."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{CONFIG}"
    temporary.write_text(json.dumps(to_json(config), indent=1) + "\n", encoding="utf-8")
    temporary.replace(out / CONFIG)


def _check_folder(data: str, classes: int) -> None:
    names = check_classes_agree(data_folder(data))
    for split in ("train", "val"):
        check_not_empty(data_folder(data), split, names)
    if classes > len(names):
        raise ValueError(f"--classes {classes}: {data} has {len(list_classes(Path(data), 'train'))} classes")


def _check_model(config: TrainConfig) -> None:
    import torch

    from fast_spatial import model
    from fast_spatial.optim import find_apex_sgd

    with torch.device("meta"):
        model.build(config.arch, 10)
    if config.optimizer == "apex":
        find_apex_sgd()
    if config.dtype == "float16" and not torch.cuda.is_available():
        raise ValueError("--dtype float16: it needs a GPU, and none is visible; use float32 or bfloat16")
