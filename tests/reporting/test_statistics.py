"""Intervals: against published examples and other implementations, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from fast_spatial.reporting.statistics import Interval, difference, mean, paired_difference, wilson
from fast_spatial.reporting.tables import percent, points

RUNS = 4000
# Three standard errors of a share of 95 % over so many simulations.
ERROR = 3 * math.sqrt(0.95 * 0.05 / RUNS)


def shares_of(low: NDArray[np.float64], high: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    return float(((low <= truth) & (truth <= high)).mean())


# --- against other sources


@pytest.mark.parametrize(("right", "count"), [(81, 263), (15, 148), (0, 20), (1, 29), (29, 29), (50000, 50000)])
def test_wilson_is_scipys(right, count):
    found = wilson(right, count)
    theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert found == pytest.approx((right / count, theirs.low, theirs.high), abs=1e-12)


def test_newcombes_own_examples_of_two_samples():
    """Statistics in Medicine 17:873, table II, method 10."""
    assert difference(wilson(56, 70), wilson(48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert difference(wilson(10, 10), wilson(0, 10)) == pytest.approx((1.0, 0.6075, 1.0), abs=5e-5)
    assert difference(wilson(5, 56), wilson(0, 29)) == pytest.approx((0.0893, -0.0381, 0.1926), abs=5e-5)


def test_newcombes_own_examples_of_pairs():
    """Statistics in Medicine 17:2635, table III, method 10."""
    assert paired_difference(36, 12, 2, 0) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)
    assert paired_difference(54, 0, 0, 0) == pytest.approx((0.0, -0.0664, 0.0664), abs=5e-5)


@pytest.mark.parametrize("count", [2, 3, 11, 200])
def test_the_mean_is_scipys(count):
    values = np.random.default_rng(count).normal(size=count)
    theirs = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert mean(values.tolist()) == pytest.approx((values.mean(), theirs.low, theirs.high), abs=1e-9)


def test_intervals_hold_their_estimate_and_stay_inside():
    for count in (1, 2, 7, 300):
        for right in {0, 1, count // 2, count}:
            found = wilson(right, count)
            assert 0 <= found.low <= found.value <= found.high <= 1
            assert found.high - found.low > 0
    assert paired_difference(0, 10, 0, 0).high == 1.0
    assert mean([0.5]).value == 0.5
    for unknown in (mean([0.5]), mean([0.7, 0.7, 0.7])):
        assert math.isnan(unknown.low) and math.isnan(unknown.clipped().low) and math.isnan(unknown.clipped().high)
        assert math.isnan(difference(unknown, wilson(1, 2)).low) and math.isnan(difference(wilson(1, 2), unknown).high)
        assert percent(unknown) == f"{100 * unknown.value:.1f}"
        assert points(unknown) == f"+{100 * unknown.value:.1f}"
    for wrong in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson(*wrong)


def test_the_same_images_tell_more_than_others():
    """Two models that agree on most images differ by less than two samples would let one say."""
    paired = paired_difference(900, 30, 10, 60)
    apart = difference(wilson(930, 1000), wilson(910, 1000))
    assert paired.value == pytest.approx(apart.value)
    assert paired.low > 0 > apart.low


# --- how often they hold the truth


@pytest.mark.parametrize("count", [10, 30, 100, 300])
@pytest.mark.parametrize("region", [(0.0, 0.1), (0.3, 0.7), (0.9, 1.0)])
def test_wilson_covers_95_percent(count, region):
    """On average over a region; at single proportions the coverage of any interval for counts oscillates."""
    random = np.random.default_rng(count)
    truth = random.uniform(region[0], region[1], RUNS)
    table = np.array([wilson(right, count) for right in range(count + 1)])
    found = table[random.binomial(count, truth)]
    assert abs(shares_of(found[:, 1], found[:, 2], truth) - 0.95) < ERROR + 0.01


@pytest.mark.parametrize("truth", [0.02, 0.05, 0.2, 0.5, 0.8, 0.95, 0.98])
def test_wilson_covers_every_proportion_well(truth):
    random = np.random.default_rng(7)
    table = np.array([wilson(right, 300) for right in range(301)])
    found = table[random.binomial(300, truth, RUNS)]
    assert abs(shares_of(found[:, 1], found[:, 2], np.full(RUNS, truth)) - 0.95) < ERROR + 0.02


def test_an_interval_that_is_too_short_would_be_found():
    """The usual p +- 1.96 standard errors fails where Wilson's does not."""
    random = np.random.default_rng(0)
    truth = random.uniform(0.0, 0.1, RUNS)
    p = random.binomial(30, truth) / 30
    half = 1.96 * np.sqrt(p * (1 - p) / 30)
    assert shares_of(p - half, p + half, truth) < 0.85


@pytest.mark.parametrize("count", [30, 300])
@pytest.mark.parametrize("regions", [((0.0, 0.1), (0.0, 0.3)), ((0.4, 0.8), (0.2, 0.6)), ((0.9, 1.0), (0.9, 1.0))])
def test_the_difference_of_two_samples_covers_95_percent(count, regions):
    random = np.random.default_rng(count)
    first, second = (random.uniform(region[0], region[1], RUNS) for region in regions)
    rights = random.binomial(count, first), random.binomial(5 * count, second)
    pairs = zip(rights[0].tolist(), rights[1].tolist())
    found = np.array([difference(wilson(a, count), wilson(b, 5 * count)) for a, b in pairs])
    assert abs(shares_of(found[:, 1], found[:, 2], first - second) - 0.95) < ERROR + 0.015


@pytest.mark.parametrize("count", [30, 300])
@pytest.mark.parametrize("agree", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("regions", [((0.0, 0.1), (0.0, 0.3)), ((0.4, 0.8), (0.2, 0.6)), ((0.9, 1.0), (0.9, 1.0))])
def test_the_difference_of_pairs_covers_95_percent(count, agree, regions):
    """Two models that share a part of their luck; where a handful of images decides, it covers more than it says."""
    random = np.random.default_rng(count)
    first, second = (random.uniform(region[0], region[1], RUNS) for region in regions)
    shared = np.minimum(first, second) * np.maximum(0, 1 - np.maximum(first, second))
    both = first * second + agree * shared
    cells = np.stack([both, first - both, second - both, 1 - first - second + both], axis=1).clip(0)
    counts = random.multinomial(count, cells / cells.sum(axis=1, keepdims=True))
    found = np.array([paired_difference(*row) for row in counts.tolist()])
    share = shares_of(found[:, 1], found[:, 2], first - second)
    assert share > 0.95 - ERROR - 0.015
    if count == 300 and agree < 0.9:
        assert share < 0.975


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_the_mean_of_seeds_covers_95_percent(count):
    random = np.random.default_rng(count)
    values = random.normal(0.4, 0.02, (RUNS, count))
    found = np.array([mean(row) for row in values.tolist()])
    assert abs(shares_of(found[:, 1], found[:, 2], np.full(RUNS, 0.4)) - 0.95) < ERROR


def test_intervals_are_named():
    assert wilson(1, 2)._fields == Interval._fields == ("value", "low", "high")
