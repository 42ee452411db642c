"""Compare every placement that runs on this machine with a float64 reference: pixel errors and chosen views.

    python -m benchmarks.placements [--json FILE] [--side 224] [--images 24]

Each placement runs in a separate process, so that a crash is a line in the table. Without a GPU, our Triton kernels
run in Triton's interpreter.

The reference decodes with PIL, then resizes (torch's antialiased bilinear), transforms colours and warps in float64. It
rounds to 8 bits where all backends do: after the resize and after the colours. B images, V views of each, S image size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks.jpegs import write_photograph
from fast_spatial.evaluation.attack import losses_of, worst_view
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward
from fast_spatial.kernels.colour import write_colour_matrix
from fast_spatial.kernels.layout import Colour, Geometry, Header
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import TRAINING, Augmentation, Views, draw_image, pack_key
from fast_spatial.kernels.warp import warp_reference
from fast_spatial.models import classifier
from fast_spatial.models.classifier import Classifier
from fast_spatial.pipelines.dataset import ImageIndex, read_index
from fast_spatial.pipelines.loader import Loader
from fast_spatial.pipelines.placement import RUNGS, WARPS, Decoding, Placement
from fast_spatial.pipelines.sampler import BatchSampler
from fast_spatial.runtime.environment import environment
from fast_spatial.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[1]
VIEWS = Views(10, SpatialLimits(30.0, 3 / 28))
AUGMENTATIONS = {
    "training": Augmentation(center=False, flip_prob=0.5, jitter=(0.1, 0.1, 0.1), lighting_std=0.05),
    "evaluation": Augmentation(center=True),
}
CLASSES = 10
TIMEOUT_SEC = 300


def main() -> None:
    """Print the table, and write it to the `--json` file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.placements",
        description="Compare every placement that runs here with a float64 reference.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--side", type=_positive, default=224, help="image size of the views in pixels (224)")
    parser.add_argument("--images", type=_positive, default=24, help="number of synthetic photographs (24)")
    asked = parser.parse_args()
    on_gpu, rows = torch.cuda.is_available(), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.images):
            write_photograph(Path(folder) / "train" / f"class_{number % 2}" / f"{number:03}.jpg", number)
        for placement in placements(on_gpu=on_gpu):
            print(f"decoding on {placement.decoding}, warp {placement.warp} ...", file=sys.stderr, flush=True)
            rows.append(_in_child(placement, folder, asked.side, on_gpu=on_gpu))
    print(table(rows))
    if asked.json:
        write_json(asked.json, {**environment(), "side": asked.side, "images": asked.images, "placements": rows})


def _positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)


def placements(*, on_gpu: bool) -> list[Placement]:
    """All placements that the hardware supports."""
    rungs = RUNGS if on_gpu else [rung for rung in RUNGS if rung.on == "cpu"]
    return [Placement(rung, warp) for rung in rungs for warp in WARPS if warp != "numba" or rung.on == "cpu"]


def table(rows: list[dict[str, Any]]) -> str:
    """The table: a line per placement and way of cropping."""
    lines = [f"{'decoded on':<42}{'views by':<10}{'crops of':<12}{'largest':>8}{'mean':>8}{'same choice':>13}"]
    for row in rows:
        head = f"{row['decoding']:<42}{row['warp']:<10}"
        if "failed" in row:
            lines.append(f"{head}failed: {row['failed']}")
        for name in AUGMENTATIONS if "failed" not in row else ():
            found = row[name]
            lines.append(
                f"{head}{name:<12}{found['max']:>8.2f}{found['mean']:>8.3f}{found['same_choice_pct']:>11.1f} %"
            )
    told = ["largest and mean: differences from the float64 reference, in units of 1/255"]
    told += ["same choice: share of images for which a network selects the same worst view"]
    return "\n".join([*lines, *told])


def _in_child(placement: Placement, folder: str, side: int, *, on_gpu: bool) -> dict[str, Any]:
    decoding = placement.decoding
    words = [decoding.on, str(decoding.hw_decoder_load), placement.warp, folder, str(side)]
    interpreted = {"TRITON_INTERPRET": "1"} if placement.warp == "triton" and not on_gpu else {}
    row: dict[str, Any] = {"decoding": str(decoding), "warp": placement.warp}
    try:
        ended = subprocess.run(
            [sys.executable, "-c", f"from benchmarks.placements import measure; measure(*{words!r})"],
            cwd=ROOT,
            env={**os.environ, **interpreted},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SEC,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"no answer within {TIMEOUT_SEC} seconds"}
    if ended.returncode:
        last = (ended.stderr.strip() or f"exit status {ended.returncode}").splitlines()[-1]
        return {**row, "failed": last[:300], "exit_status": ended.returncode}
    return {**row, **json.loads(ended.stdout.splitlines()[-1])}


def measure(on: str, hw_decoder_load: str, warp: str, folder: str, side: str) -> None:
    """Entry point of the child: print a placement's differences as JSON."""
    placement = Placement(Decoding(on, float(hw_decoder_load)), warp)
    images = read_index(Path(folder), "train")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    passes = BatchedForward(FoldedJudge(Classifier(classifier.build("resnet18", CLASSES)), torch.float32), 16)
    print(
        json.dumps(
            {name: _against_reference(images, name, int(side), placement, device, passes) for name in AUGMENTATIONS}
        )
    )


def _against_reference(
    images: ImageIndex, name: str, side: int, placement: Placement, device: torch.device, passes: BatchedForward
) -> dict[str, float]:
    loader = Loader(
        BatchSampler(images, global_batch_size=min(8, len(images)), seed=0, train=True),
        augmentation=AUGMENTATIONS[name],
        views=VIEWS,
        side=side,
        device=device,
        placement=placement,
    )
    largest, means, same = 0.0, [], []
    for batch in loader.epoch(0):
        views_BVSSC = batch.views.cpu()
        expected_BVSSC = torch.stack(
            [reference(images, position, AUGMENTATIONS[name], side) for position in batch.index.tolist()]
        )
        difference = (views_BVSSC - expected_BVSSC).abs()
        largest = max(largest, difference.max().item())
        means.append(difference.mean().item())
        # Labels unrelated to the images, so that the identity view has no advantage.
        labels_B = batch.index % CLASSES
        chosen, wanted = (
            worst_view(losses_of(passes(views), labels_B))
            for views in (views_BVSSC, expected_BVSSC.round().to(torch.uint8))
        )
        same += (chosen == wanted).tolist()
    return {
        "max": round(largest, 3),
        "mean": round(sum(means) / len(means), 4),
        "same_choice_pct": round(100 * sum(same) / len(same), 1),
    }


def reference(images: ImageIndex, position: int, augmentation: Augmentation, side: int) -> Tensor:
    """An image's views in the first epoch, float64 [V, S, S, 3] of 255, before the last rounding."""
    pixels = np.asarray(Image.open(images.path(position)).convert("RGB"))
    header = np.zeros(len(Header), np.int64)
    header[Header.KEY], header[Header.INDEX], header[Header.SIDE] = pack_key(TRAINING, 0), position, side
    geometry, numbers = np.zeros(len(Geometry), np.int32), np.zeros(len(Colour), np.float32)
    matrices_V23 = np.zeros((len(VIEWS), 2, 3), np.float32)
    shape_HWC = np.array(pixels.shape)
    draw_image(geometry, numbers, matrices_V23, header, shape_HWC, VIEWS.rows(), augmentation.row())
    top, left, height, width = geometry[Geometry.BOX_Y : Geometry.BOX_W + 1]
    box = torch.from_numpy(pixels[top : top + height, left : left + width].astype(np.float64)).permute(2, 0, 1)
    size = [int(geometry[Geometry.RESIZED_H]), int(geometry[Geometry.RESIZED_W])]
    resized = interpolate(box[None], size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    y, x = int(geometry[Geometry.CROP_Y]), int(geometry[Geometry.CROP_X])
    crop_SSC = resized[y : y + side, x : x + side].add(0.5).floor().clamp(0, 255)
    colour_34 = np.zeros((3, 4), np.float64)
    write_colour_matrix(colour_34, numbers, crop_SSC.mean(dim=(0, 1)).numpy())
    matrices_1V23 = torch.from_numpy(matrices_V23.astype(np.float64))[None]
    return warp_reference(crop_SSC[None], matrices_1V23, torch.from_numpy(colour_34)[None])[0]


if __name__ == "__main__":
    main()
