"""What an evaluation pays for reading images twice: once for all attacks but the grid, and the survivors for the grid.

    OMP_WAIT_POLICY=passive python -m benchmarks.second_read --json_file benchmarks/results/second-read.json

One network is robust: a ResNet-18 trained on random warps of the digits. The other is as bad as can be: a ResNet-18 of
224 px that has memorized synthetic JPEG files of ImageNet's size. It is right on all of them, and almost any warp
breaks it. So all images are read twice, and few views are judged in between.

OMP_WAIT_POLICY keeps threads that wait from counting as work.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import torch
from torch import nn

from benchmarks.jpegs import synthetic_images
from benchmarks.trained import digits_checkpoint
from fast_spatial.config.commands import EvaluateConfig
from fast_spatial.config.modes import DIGITS
from fast_spatial.evaluation.evaluate import evaluate_checkpoint
from fast_spatial.evaluation.inputs import load_model_and_images
from fast_spatial.evaluation.process import JudgingProcess
from fast_spatial.models import classifier
from fast_spatial.runtime.distributed import World
from fast_spatial.runtime.environment import environment
from fast_spatial.runtime.files import write_json

ALONE = World(0, 0, 1, torch.device("cpu"))
ARCH = "resnet18"


def main(json_file: str, rounds: int = 3, max_images: int = 64) -> None:
    """Measure both networks on a CPU, alternating between whole evaluations and the second read alone."""
    about = environment()
    with tempfile.TemporaryDirectory() as folder:
        shared: Any = {"max_images": max_images, "json": str(Path(folder) / "found.json")}
        robust = EvaluateConfig(checkpoint=digits_checkpoint(), data=DIGITS, **shared)
        weak = Path(folder) / "memorized.pt"
        memorize(synthetic_images(), weak)
        brittle = EvaluateConfig(checkpoint=str(weak), data=str(synthetic_images()), arch=ARCH, **shared)
        networks = [
            {"network": name, **measure(config, rounds)}
            for name, config in (("a network trained on warps", robust), ("one that has memorized its images", brittle))
        ]
    command = "OMP_WAIT_POLICY=passive python -m benchmarks.second_read --json_file FILE"
    write_json(Path(json_file), {**about, "command": command, "rounds": rounds, "networks": networks})


def memorize(data: Path, path: Path) -> None:
    """Write a network with random features, whose last layer is fitted to the untouched images of a folder."""
    torch.manual_seed(0)
    classes = len(list((data / "val").iterdir()))
    net = classifier.build(ARCH, classes)
    torch.save(net.state_dict(), path)
    inputs = load_model_and_images(EvaluateConfig(checkpoint=str(path), data=str(data), arch=ARCH))
    process = JudgingProcess(EvaluateConfig(checkpoint=str(path), data=str(data)), inputs, ALONE)
    head = net.fc
    assert isinstance(head, nn.Linear)
    net.fc = nn.Identity()
    with torch.no_grad():
        model = classifier.Classifier(net).eval()
        batches = list(process.batches("memorize", 16, order=None))
        features = torch.cat([model(batch.views[:, 0]) for batch in batches]).double()
        labels = torch.cat([batch.labels for batch in batches])
        deviation, mean = torch.std_mean(features, dim=0)
        scale = 1 / deviation.clamp(min=1e-6)
        fitted = torch.linalg.pinv((features - mean) * scale) @ (nn.functional.one_hot(labels, classes).double() - 0.5)
        head.weight.copy_((fitted * scale[:, None]).T)
        head.bias.copy_(-(mean * scale) @ fitted)
    net.fc = head
    torch.save(net.state_dict(), path)


def measure(config: EvaluateConfig, rounds: int) -> dict[str, Any]:
    """CPU seconds, of all threads, of an evaluation and of the second read alone; other programs do not change them."""
    evaluations, reads = [], []
    for _ in range(rounds):
        start = time.process_time()
        evaluate_checkpoint(config, ALONE)
        evaluations.append(time.process_time() - start)
        content = json.loads(Path(config.json).read_text(encoding="utf-8"))
        inputs = load_model_and_images(config)
        process = JudgingProcess(config, inputs, ALONE)
        right = inputs.images.positions_of([row["path"] for row in content["images"] if row["natural"]])
        start = time.process_time()
        for batch in process.batches("grid", config.batch_size_per_process, order=right, alone=True):
            assert len(batch.index)
        reads.append(time.process_time() - start)
    summary = content["summary"]
    return {
        "images": summary["num_images"],
        "read_twice": len(right),
        "grid_top1_pct": summary["grid_top1_pct"],
        "grid_views_per_image": summary["grid_views_per_image"],
        "evaluation_cpu_sec": [round(value, 2) for value in evaluations],
        "second_read_cpu_sec": [round(value, 3) for value in reads],
        "share_pct": round(100 * statistics.median(read / whole for read, whole in zip(reads, evaluations)), 2),
    }


if __name__ == "__main__":
    fire.Fire(main)
