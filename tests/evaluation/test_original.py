"""Against results of the original code, for who has them.

Set FAST_SPATIAL_REFERENCE to a folder with `checkpoint.pt.best` (written by the original code), `images/val/<class>/*`
`original.json`: `files`, `natural` (correct or not, per file), `random_top1_pct` and `worst10_top1_pct` (three draws,
draws, percent) and `grid` (file -> {"original", "all_775_correct"}).
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from fast_spatial import commands
from fast_spatial.config.commands import EvaluateConfig
from fast_spatial.evaluation.folded import FoldedJudge
from fast_spatial.evaluation.forward import BatchedForward
from fast_spatial.evaluation.inputs import load_model_and_images
from fast_spatial.evaluation.verdicts import ImageVerdict, judge_images
from fast_spatial.kernels.limits import SpatialLimits
from fast_spatial.kernels.sampling import Augmentation, Views
from fast_spatial.pipelines.loader import Loader
from fast_spatial.pipelines.sampler import BatchSampler

REFERENCE = Path(os.environ.get("FAST_SPATIAL_REFERENCE", "nowhere"))
NEAR_TIE = 1e-3
SEEDS, CONTROL_SEEDS = 20, 5
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REFERENCE.is_dir(), reason="FAST_SPATIAL_REFERENCE names no folder"),
]


@pytest.fixture(scope="module")
def original() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((REFERENCE / "original.json").read_text())
    return content


def test_natural_and_grid_verdicts_are_the_originals(tmp_path, original):
    listing = tmp_path / "grid.txt"
    listing.write_text("\n".join(original["grid"]))
    words = ["evaluate", "--checkpoint", str(REFERENCE / "checkpoint.pt.best"), "--data", str(REFERENCE / "images")]
    words += ["--dtype", "float32", "--json", str(tmp_path / "found.json"), "--grid-images", str(listing)]
    assert commands.main(words) == 2  # the model has 1000 outputs, the folder 10 classes
    assert commands.main([*words, "--allow-partial-classes"]) == 0
    found = {row["path"]: row for row in json.loads((tmp_path / "found.json").read_text())["images"]}
    assert sorted(found) == sorted(original["files"])
    different = [
        path
        for path, natural in zip(original["files"], original["natural"])
        if found[path]["natural"] != natural and found[path]["natural_margin"] >= NEAR_TIE
    ]
    assert different == []
    assert {path: found[path]["grid"] for path in original["grid"]} == {
        path: verdict["all_775_correct"] for path, verdict in original["grid"].items()
    }


def draws(degrees: float, seeds: int) -> list[list[ImageVerdict]]:
    """The verdicts of evaluations that differ in their random views, without the grid."""
    config = EvaluateConfig(
        checkpoint=str(REFERENCE / "checkpoint.pt.best"), data=str(REFERENCE / "images"), allow_partial_classes=True
    )
    model, images, _, side = load_model_and_images(config)
    passes = BatchedForward(FoldedJudge(model, torch.float32), 64, pad=True)
    found = []
    for seed in range(seeds):
        loader = Loader(
            BatchSampler(images, global_batch_size=25, seed=seed, train=False),
            augmentation=Augmentation(center=True),
            views=Views(10, SpatialLimits.from_px(degrees)),
            side=side,
        )
        found.append([verdict for batch in loader.epoch(0) for verdict in judge_images(passes, batch)])
    return found


def agrees(ours: list[float], theirs: list[float]) -> bool:
    """Whether two samples' means lie within three standard errors of their difference."""
    spread = max(statistics.stdev(ours), 1e-9)
    error = spread * (1 / len(ours) + 1 / len(theirs)) ** 0.5
    return bool(abs(statistics.mean(ours) - statistics.mean(theirs)) <= 3 * error)


@pytest.mark.parametrize(("degrees", "seeds", "expected"), [(30.0, SEEDS, True), (15.0, CONTROL_SEEDS, False)])
def test_random_and_worst_of_10_agree_and_would_not_at_half_the_limits(original, degrees, seeds, expected):
    found = draws(degrees, seeds)
    random = [100 * statistics.mean(v.random for v in verdicts) for verdicts in found]
    worst = [100 * statistics.mean(v.worst10 for v in verdicts) for verdicts in found]
    print(f"{degrees:g} degrees: random {statistics.mean(random):.2f}, worst-of-10 {statistics.mean(worst):.2f}")
    both = agrees(random, original["random_top1_pct"]) and agrees(worst, original["worst10_top1_pct"])
    assert both is expected
