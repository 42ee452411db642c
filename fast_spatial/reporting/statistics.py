"""95 % intervals of the numbers in a report.

Accuracies are proportions of images. Intervals describe the sampling of images, or of seeds for runs of several seeds.
Values are fractions, not percent. Quantiles are of `scipy.special`: importing `scipy.stats`, which also has Wilson's
interval, would take half a second of every report. No library that we need has Newcombe's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import special

_TAIL = 0.975
Z = float(special.ndtri(_TAIL))


class Interval(NamedTuple):
    """An estimate and its 95 % interval, whose limits are NaN if nothing is known of the spread."""

    value: float
    low: float
    high: float

    def clipped(self) -> Interval:
        """The interval within [0, 1], the range of a proportion."""
        return self._replace(low=max(self.low, 0.0), high=min(self.high, 1.0))  # NaN comes first, and stays


def wilson(right: int, count: int) -> Interval:
    """A proportion by Wilson's score interval (JASA 22:209, 1927); near 0 and 1 it stays inside them.

    Raises:
        ValueError: unless 0 <= right <= count, and count is at least 1.

    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"{right} of {count} is no proportion")
    p, spread = right / count, Z**2 / count
    centre = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / count + spread / (4 * count)) / (1 + spread)
    # Exact at the ends, where rounding would leave the estimate outside.
    return Interval(p, 0.0 if right == 0 else centre - half, 1.0 if right == count else centre + half)


def mean(values: Sequence[float]) -> Interval:
    """The mean of independent values, by Student's t. A single value, or equal ones, have NaN limits."""
    value = statistics.fmean(values)
    if len({*values}) < 2:  # rounded to whole images, equal values do not mean that there is no spread
        return Interval(value, math.nan, math.nan)
    quantile = float(special.stdtrit(len(values) - 1, _TAIL))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(value, value - half, value + half)


def difference(first: Interval, second: Interval) -> Interval:
    """The first minus the second, if independent: the distances to their limits are squared and added.

    For two Wilson intervals this is Newcombe's hybrid score interval, method 10 of Statistics in Medicine 17:873
    (1998). For others it is MOVER by Zou and Donner (Statistics in Medicine 27:1693, 2008).
    """
    return _combined(first, second, correlation=0.0)


def paired_difference(both: int, first_only: int, second_only: int, neither: int) -> Interval:
    """The first proportion minus the second on the same images, from the counts right for both, one or neither.

    Newcombe's hybrid score interval for paired proportions, method 10 of Statistics in Medicine 17:2635 (1998).
    """
    count = both + first_only + second_only + neither
    first, second = wilson(both + first_only, count), wilson(both + second_only, count)
    margins = (both + first_only) * (second_only + neither) * (both + second_only) * (first_only + neither)
    if margins == 0:
        return _combined(first, second, correlation=0.0)
    covariance = float(both * neither - first_only * second_only)
    if covariance > 0:  # a continuity correction, towards no correlation
        covariance = max(0.0, covariance - count / 2)
    return _combined(first, second, correlation=covariance / math.sqrt(margins))


def _combined(first: Interval, second: Interval, *, correlation: float) -> Interval:
    value = first.value - second.value

    def half(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))  # NaN comes first, and stays

    below = half(first.value - first.low, second.high - second.value)
    above = half(first.high - first.value, second.value - second.low)
    return Interval(value, value - below, value + above)
