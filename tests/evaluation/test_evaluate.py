"""Judging any model from Python."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fast_spatial.config.commands import EvaluateConfig
from fast_spatial.evaluation.evaluate import evaluate, published_deviations, summary_table
from fast_spatial.evaluation.verdicts import ImageVerdict, summarize

ROOT = Path(__file__).parents[2]


class Brightness(nn.Module):
    """Calls an image class 1 if it is brighter than a threshold: rotations darken, since outside is black."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, images):
        margin = images.mean(dim=(1, 2, 3)) - self.threshold
        return torch.stack([-margin, margin], dim=1)


def test_a_model_whose_answers_are_known():
    images, labels = torch.ones(6, 3, 33, 33), torch.ones(6, dtype=torch.long)
    robust = evaluate(Brightness(0.05), [(images, labels)])
    assert (
        robust.natural_top1_pct == robust.worst10_top1_pct == robust.worst10_any_top1_pct == robust.grid_top1_pct == 100
    )
    assert robust.num_images == robust.grid_num_images == 6
    brittle = evaluate(Brightness(0.999), [(images, labels)])
    assert brittle.natural_top1_pct == 100
    assert brittle.random_top1_pct == brittle.worst10_top1_pct == brittle.grid_top1_pct == 0


def test_verdicts_depend_on_neither_batches_nor_the_judging_shape():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).eval()
    images = torch.rand(10, 3, 21, 21)
    labels = model(images).argmax(dim=1)
    whole = evaluate(model, [(images, labels)])
    parts = evaluate(model, zip(images.split(3), labels.split(3)), judge_batch=50)
    assert whole == parts
    assert whole.grid_top1_pct is not None
    assert whole.grid_top1_pct <= whole.worst10_any_top1_pct <= whole.worst10_top1_pct <= whole.natural_top1_pct == 100


def test_the_draws_change_with_the_seed_alone():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)).eval()
    images = torch.rand(40, 3, 21, 21)
    labels = model(images).argmax(dim=1)
    found = {seed: evaluate(model, [(images, labels)], grid=False, seed=seed) for seed in (0, 1, 2)}
    assert found[0] == evaluate(model, [(images, labels)], grid=False, seed=0)
    assert len({summary.random_top1_pct for summary in found.values()}) > 1
    assert found[0].grid_top1_pct is None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 8, 9), "expected float"),
        (torch.rand(2, 1, 8, 8), "expected float"),
        (torch.randint(0, 255, (2, 3, 8, 8)), "expected float"),
        (torch.rand(2, 3, 8, 8) * 255, "outside"),
    ],
)
def test_images_that_are_not_pixels_in_0_to_1_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Brightness(0.5), [(images, torch.zeros(2, dtype=torch.long))])


def test_no_images_at_all_are_refused():
    with pytest.raises(ValueError, match="nothing to report"):
        evaluate(Brightness(0.5), [])


def test_the_example_in_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    assert "right on all 775 views" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "side", "blurpool", "named"),
    [
        ({"data": "imagenet"}, 224, False, ()),
        ({"data": "imagenet"}, 256, False, ("views of 256 px instead of 224",)),
        ({"data": "digits"}, 32, False, ()),
        ({"data": "imagenet", "flip": True}, 224, False, ("logits averaged over every view and its mirror image",)),
        ({"data": "imagenet"}, 224, True, ("a network with BlurPool",)),
    ],
)
def test_what_is_not_the_published_protocol_is_named(options, side, blurpool, named):
    config = EvaluateConfig(checkpoint="c.pt", **options)
    assert published_deviations(config, side, blurpool=blurpool) == named
    verdict = ImageVerdict(0, 0, True, True, True, True, None, 1.0)
    summary = summarize([verdict], config.limits, 10, partial=False, deviations=named)
    table = summary_table(summary)
    assert [f"  not the published protocol: {text}" in table.splitlines() for text in named] == [True] * len(named)
    assert ("not the published" in table) is bool(named)
