"""Views that Triton makes from crops, in its interpreter: the same pixels, chosen views and training steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

VIEWS = """
import numpy as np, torch
from fast_spatial.kernels import warp_cuda
from fast_spatial.kernels.colour import write_colour_matrix, write_mean_rgb
from fast_spatial.kernels.crops import Crops
from fast_spatial.kernels.layout import Colour
from fast_spatial.kernels.spatial import matrices
from fast_spatial.kernels.warp import normalize, warp_reference

rng = np.random.default_rng(0)
for side in (1, 9, 70):
    B, V = 3, 4
    images = torch.from_numpy(rng.integers(0, 256, (B, side, side, 3)).astype(np.uint8))
    images[2] = 255  # the largest sums
    numbers = rng.uniform(0.5, 1.5, (B, len(Colour))).astype(np.float32)
    numbers[:, 3:] = rng.normal(0, 9, (B, 3))
    expected, mean = np.empty((B, 3, 4), np.float32), np.empty(3, np.float32)
    for b in range(B):
        write_mean_rgb(mean, images[b].numpy())
        write_colour_matrix(expected[b], numbers[b], mean)
    found = warp_cuda.colour_matrices(images, torch.from_numpy(numbers))
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=1e-5)
    rows = torch.from_numpy(matrices(rng.uniform(-1, 1, (B, V, 3)) * (180, 0.4, 0.4), side))
    crops = Crops(images, rows, torch.from_numpy(numbers))
    views = crops.views()
    assert views.dtype == torch.uint8 and views.shape == (B, V, side, side, 3)
    difference = (views - warp_reference(images, rows.double(), torch.from_numpy(expected).double())).abs()
    # A colour that ends in a half may be rounded either way.
    assert (difference < 0.52).double().mean() > 0.999 and difference.max() < 1.52
    scale, shift = torch.tensor([0.017, 0.018, 0.019]), torch.tensor([-2.1, -2.0, -1.8])
    for dtype, error in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        made = crops.normalized(scale, shift, dtype)
        assert made.is_contiguous(memory_format=torch.channels_last)
        assert (made - normalize(views.flatten(0, 1), scale, shift, dtype)).abs().max() <= error
print("alike")
"""

STEPS = """
import copy, itertools, json, sys
import torch
from torch import nn
from fast_spatial.models.classifier import Classifier
from fast_spatial.training.step import TrainStep
from fast_spatial.kernels.crops import Crops
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.pipelines.dataset import read_index
from fast_spatial.pipelines.digits import export_digits
from fast_spatial.pipelines.loader import Batch, Loader
from fast_spatial.pipelines.placement import Decoding, Placement
from fast_spatial.pipelines.sampler import BatchSampler

warps, options = int(sys.argv[1]), json.loads(sys.argv[2])
loader = Loader(
    BatchSampler(read_index(export_digits(), "train"), global_batch_size=8, seed=0, train=True),
    augmentation=Augmentation(center=False, flip_prob=0.5, jitter=(0.1, 0.1, 0.1), lighting_std=0.05),
    views=Views(warps, SpatialLimits(30, 3 / 28), untouched_first=warps > 1),
    side=16,
    placement=Placement(Decoding("cpu"), "triton"),
)
torch.manual_seed(0)
first = Classifier(
    nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 4),
    )
)
steps = [
    TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.05), dtype=torch.float32, scored=warps > 1, **options)
    for model in (first, copy.deepcopy(first))
]
chosen = set()
for batch in itertools.islice(loader.epoch(0), 2):
    assert isinstance(batch.made, Crops) and batch.side == 16
    labels = batch.labels % 4
    ours = steps[0](Batch(batch.made, labels, batch.index))
    theirs = steps[1](Batch(batch.views, labels, batch.index))
    assert torch.equal(ours.choice, theirs.choice)
    assert torch.equal(ours.correct, theirs.correct)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-5)
    chosen |= set(ours.choice.tolist())
for one, other in zip(steps[0].model.parameters(), steps[1].model.parameters()):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
assert len(chosen) > 2 or warps == 1
print("alike")
"""


def run(*words: str) -> str:
    pytest.importorskip("triton")
    ended = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def test_views_of_crops_are_the_reference():
    assert "alike" in run("-c", VIEWS)


@pytest.mark.parametrize(
    ("warps", "options"),
    [(6, {}), (6, {"views_per_forward": 20, "grad_accum_steps": 2}), (6, {"score_size": 8}), (1, {})],
    ids=["judged", "in parts", "judged smaller", "one view"],
)
def test_a_step_on_crops_is_the_step_on_their_views(warps, options):
    assert "alike" in run("-c", STEPS, str(warps), json.dumps(options))


def test_every_placement_that_can_run_here_gives_the_views_of_the_reference(tmp_path):
    file = tmp_path / "placements.json"
    printed = run("-m", "benchmarks.placements", "--json", str(file), "--side", "40", "--images", "8")
    found = {(row["decoding"], row["warp"]): row for row in json.loads(file.read_text())["placements"]}
    assert {("CPU", "dali"), ("CPU", "triton"), ("CPU", "numba")} <= found.keys()
    assert [row["failed"] for row in found.values() if "failed" in row] == []
    for (_, warp), row in found.items():
        for crops in ("training", "evaluation"):
            off = row[crops]
            # DALI's resize is inaccurate at the edges of small boxes.
            assert off["max"] < (16 if warp == "dali" and crops == "training" else 3), (warp, crops)
            assert off["mean"] < 0.4, (warp, crops)
            assert off["same_choice_pct"] >= 75, (warp, crops)
    assert printed.count("%") == 2 * len(found)
