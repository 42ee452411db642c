"""95 % intervals of the numbers in a report.

Accuracies are proportions of images. Intervals describe the sampling of images, or of seeds for runs of several seeds.
Values are fractions, not percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Quantiles of the normal distribution and, by degrees of freedom, of Student's t, at 97.5 %.
Z = 1.959963984540054
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


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
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == count else centre + half
    return Interval(p, low, high)


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
    covariance = both * neither - first_only * second_only
    if covariance > 0:  # a continuity correction, towards no correlation
        covariance = max(0.0, covariance - count / 2)  # type: ignore[assignment]
    return _combined(first, second, correlation=covariance / math.sqrt(margins))


def mean(values: Sequence[float]) -> Interval:
    """The mean of independent values, by Student's t. A single value has NaN limits."""
    count = len(values)
    value = math.fsum(values) / count
    if count < 2:
        return Interval(value, math.nan, math.nan)
    variance = math.fsum((v - value) ** 2 for v in values) / (count - 1)
    half = t_quantile(count - 1) * math.sqrt(variance / count)
    return Interval(value, value - half, value + half)


def t_quantile(degrees_of_freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to four digits; beyond the table by the Cornish-Fisher expansion."""
    if degrees_of_freedom <= len(_T):
        return _T[degrees_of_freedom - 1]
    nu = degrees_of_freedom
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / nu + second / nu**2 + third / nu**3


def _combined(first: Interval, second: Interval, *, correlation: float) -> Interval:
    value = first.value - second.value

    def half(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))

    below = half(first.value - first.low, second.high - second.value)
    above = half(first.high - first.value, second.value - second.low)
    return Interval(value, value - below, value + above)
