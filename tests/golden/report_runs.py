"""Folders as three trainings leave them: numbers made up, so that everything a report says of them is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fast_spatial.config.fields import to_json
from fast_spatial.config.train import TrainConfig
from fast_spatial.kernels.limits import GRID_VIEWS, SpatialLimits
from fast_spatial.kernels.spatial import GRID_IDENTITY, grid

IMAGES = 50
STARTED = {
    "steps_before": 0,
    "command": "launch.py reproduce --data /data/pets --out runs --epochs 2",
    "world_size": 2,
    "hardware": "8 cores of a CPU, 2 x NVIDIA H100",
    "gpus": ["NVIDIA H100", "NVIDIA H100"],
    "cuda": "13.0",
    "cudnn": 92400,
    "nccl": "2.30.7",
    "driver": "580.65.06",
    "os": "Linux",
    "python": "3.11.7",
    "versions": {"torch": "2.14.1", "numba": "0.68.1"},
    "commit": "0123456789abcdef",
    "dirty": False,
}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_run(out: Path, mode: str, *, degrees: float = 30.0, seed: int = 0, epochs: int = 2) -> Path:
    """A finished training of two epochs on two GPUs, half an hour each, 0.25 kWh a record."""
    out.mkdir(parents=True)
    config = TrainConfig(data="/data/pets", out=str(out), mode=mode, degrees=degrees, seed=seed, epochs=epochs)
    (out / "config.json").write_text(json.dumps(to_json(config)), encoding="utf-8")
    write_lines(out / "environment.jsonl", [{"started": f"2026-01-0{seed + 1}T10:00:00+00:00", **STARTED}])
    records: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        shared = {"elapsed_sec": 1800.0 * epoch, "gpu_hours": 1.0 * epoch, "energy_kwh": 0.25}
        rate = 900.0 + 100 * epoch
        train = {"loss": 2.0 / epoch, "top1_pct": 30.0 * epoch, "lr": 0.1, "images_per_sec": rate, "data_wait_pct": 1.0}
        records.append({"event": "train", "epoch": epoch, **train, **shared})
        if mode == "worst10":
            bins = {"degrees": [30, 20, 10, 10, 20, 30], "tx_px": [20] * 6, "ty_px": [20] * 6}
            limits = {"limit_degrees": degrees, "limit_px": 0.8 * degrees}
            records.append({"event": "chosen", "epoch": epoch, "untransformed_pct": 20.0 / epoch, **bins, **limits})
        attacked = None if mode in ("nocrop", "standard") else 20.0 * epoch
        scores = {"top1_pct": 40.0 * epoch, "top5_pct": 90.0, "loss": 1.0 / epoch, "attacked_top1_pct": attacked}
        records.append({"event": "evaluation", "epoch": epoch, **scores, "cost_pct": 5.0, **shared})
    write_lines(out / "log.jsonl", records)
    return out


def write_evaluation(out: Path, right: dict[str, int], *, images: int = IMAGES, listed: bool = True) -> None:
    """Verdicts of which, under each attack, the first so many images are right; classes take turns."""
    attacks = ("natural", "random", "worst10", "grid")
    summary = {
        **{f"{attack}_top1_pct": 100 * right[attack] / images for attack in attacks},
        **{"num_images": images, "grid_num_images": images, "degrees": 30.0, "translate_px": 24.0, "partial": False},
    }
    rows = [
        {"path": f"val/{'cat' if i % 2 else 'dog'}/{i}.jpg", **{attack: i < right[attack] for attack in attacks}}
        for i in range(images if listed else 0)
    ]
    content = {"summary": summary, "config": {}, "near_ties": [], "images": rows}
    (out / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
    (out / "result.json").write_text(json.dumps({"seconds_evaluate": 900.0}), encoding="utf-8")


def write_landscape(out: Path, breaks_at: list[float]) -> None:
    """Images that are right up to an angle each, whatever the translation; the loss is a tenth of the angle."""
    params, count = grid(SpatialLimits.from_px(30)), len(breaks_at)
    angle = np.abs(params[:, 0])
    correct = angle[None] <= np.array(breaks_at)[:, None] + 1e-6
    loss = np.broadcast_to(angle / 10, (count, GRID_VIEWS)).astype(np.float16)
    np.savez_compressed(out / "landscape.npz", loss=loss, correct=np.packbits(correct, axis=1))
    (out / "landscape").mkdir()
    for kind in ("untouched", "worst"):
        Image.new("RGB", (8, 8), (200, 120, 40)).save(out / "landscape" / f"00000_{kind}.jpg")
    sample = {
        **{"image": 0, "untouched": "landscape/00000_untouched.jpg", "worst": "landscape/00000_worst.jpg"},
        **{"worst_view": 0, "degrees": -30.0, "tx_px": -24.0, "ty_px": 12.0},
        **{"untouched_loss": float(loss[0, GRID_IDENTITY]), "worst_loss": 3.0, "worst_predicted": "dog"},
    }
    content = {
        **{"config": {}, "degrees": 30.0, "translate_px": 24.0, "side": 224, "num_images": count},
        **{"images_per_class": count // 2, "seconds": 360.0, "gpus": 2},
        "images": [{"path": f"val/{c}/{i}.jpg", "class": c} for i, c in enumerate(["cat", "dog"] * (count // 2))],
        "samples": [sample],
    }
    (out / "landscape.json").write_text(json.dumps(content), encoding="utf-8")


def write_all(out: Path) -> Path:
    """Four runs: two seeds of random:30, one of standard, and worst10:40, which was never evaluated."""
    for seed, natural in enumerate((40, 42)):
        run = write_run(out / "random_30" / f"seed_{seed}", "random", seed=seed)
        write_evaluation(run, {"natural": natural, "random": 35, "worst10": 30, "grid": 20 + 2 * seed})
    write_landscape(out / "random_30" / "seed_0", [30.0, 30.0, 20.0, 10.0])
    run = write_run(out / "standard" / "seed_0", "standard")
    write_evaluation(run, {"natural": 45, "random": 30, "worst10": 20, "grid": 5})
    write_landscape(run, [30.0, 4.0, 4.0, 0.0])
    write_run(out / "worst10_40" / "seed_0", "worst10", degrees=40.0)
    return out


if __name__ == "__main__":
    import tempfile

    from fast_spatial.reporting.report import write_report

    with tempfile.TemporaryDirectory() as folder:
        runs = write_all(Path(folder) / "runs")
        write_report([runs], runs, price=2.5)
        text = (runs / "report.md").read_text(encoding="utf-8").replace(folder, "FOLDER")
    (Path(__file__).parent / "report.md").write_text(text, encoding="utf-8")
