"""Learning rates and image sizes at points computed by hand."""

from __future__ import annotations

import pytest

from fast_spatial.config.fields import parse
from fast_spatial.config.train import TrainConfig
from fast_spatial.training.schedule import lr_at, side_at, side_starts


def config_of(**raw: str) -> TrainConfig:
    return parse(TrainConfig, {"data": "d", "out": "o", "mode": "standard", **raw})


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [
        *[(0, 1e-1), (29, 1e-1), (30, 1e-2), (59, 1e-2), (60, 1e-3), (84, 1e-3)],
        *[(85, 1e-4), (94, 1e-4), (95, 1e-5), (104, 1e-5), (105, 1e-6), (109, 1e-6)],
    ],
)
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_learning_rate_drops_at_the_start_of_each_milestone_whatever_the_progress(epoch, lr, progress):
    assert lr_at(config_of(), progress, epoch) == pytest.approx(lr, rel=1e-9)


def test_milestones_follow_the_options():
    config = config_of(lr="0.8", milestones="2,4", gamma="0.5")
    assert [lr_at(config, 0.0, epoch) for epoch in range(6)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]


@pytest.mark.parametrize(
    ("progress", "lr"),
    # 2 of 16 epochs are warm-up: the peak is at 1/8, and half of it is reached at 1/8 + 7/16.
    [(0.0, 0.0), (1 / 16, 1.0), (3 / 32, 1.5), (1 / 8, 2.0), (9 / 16, 1.0), (25 / 32, 0.5), (1.0, 0.0)],
)
@pytest.mark.parametrize("epoch", [0, 15])
def test_the_linear_schedule_rises_to_its_peak_and_falls_to_0(progress, lr, epoch):
    config = config_of(schedule="linear", lr="2.0", epochs="16", warmup_epochs="2")
    assert lr_at(config, progress, epoch) == pytest.approx(lr, rel=1e-12, abs=1e-15)


def test_without_warm_up_the_linear_schedule_begins_at_its_peak():
    config = config_of(schedule="linear", lr="0.4", epochs="10")
    assert [lr_at(config, p, 0) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.4, 0.3, 0.2, 0.0])


@pytest.mark.parametrize(
    ("start", "side", "expected"),
    [
        ("0", "224", [(0.0, 224)]),
        ("160", "192", [(0.0, 160), (0.75, 192)]),
        ("128", "224", [(0.0, 128), (0.25, 160), (0.5, 192), (0.75, 224)]),
        ("16", "32", [(0.0, 16), (0.75, 32)]),
        ("144", "192", [(0.0, 144), (0.25, 160), (0.5, 176), (0.75, 192)]),
    ],
)
def test_sides_grow_by_32_px_or_16_until_three_quarters(start, side, expected):
    config = config_of(start_size=start, image_size=side)
    assert side_starts(config) == expected
    for begin, of in expected:
        assert side_at(config, begin) == of
        if begin:
            assert side_at(config, begin - 1e-9) < of
    assert side_at(config, 1.0) == int(side)
