"""Confidence intervals: of a mean (Student's t), of a proportion (Wilson), of paired differences.

Knows numbers alone; never what they measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from edgekit.errors import UsageError


@dataclass(frozen=True)
class Interval:
    """A figure and the bounds that hold its true value with the confidence that was asked for."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """For JSON, which has no infinity: an open end is None."""
        return {
            name: number if math.isfinite(number) else None for name, number in vars(self).items()
        }


def mean(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent values, with Student's t interval.

    One value says nothing about its spread: both ends are infinite. Raises UsageError for none.
    """
    if not values:
        raise UsageError("the mean of no values")
    centre = fmean(values)
    if len(values) == 1:
        return Interval(centre, -math.inf, math.inf)
    error = stdev(values) / math.sqrt(len(values))
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * error
    return Interval(centre, centre - half, centre + half)


def paired(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of ``a - b``, value by value: what both sides felt alike cancels out.

    Raises UsageError when the sides differ in length, or are empty.
    """
    if len(a) != len(b):
        raise UsageError(f"{len(a)} and {len(b)} values make no pairs")
    return mean([one - other for one, other in zip(a, b, strict=True)], confidence)


def proportion(hits: int, total: int, confidence: float = 0.95) -> Interval:
    """The share ``hits / total`` of independent trials, with Wilson's score interval.

    E. B. Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953: it stays within 0 and 1, and
    is honest for few trials and for shares near the ends. Raises UsageError for no trials.
    """
    if not 0 <= hits <= total or not total:
        raise UsageError(f"{hits} of {total} is no proportion")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = hits / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    # At the ends the bound is exact, but for rounding.
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    high = 1.0 if hits == total else min(1.0, centre + half)
    return Interval(share, low, high)


def t_quantile(p: float, degrees: float) -> float:
    """The value that Student's t with ``degrees`` of freedom stays below with probability ``p``.

    From the upper tail I_x(degrees/2, 1/2) / 2 at x = degrees / (degrees + t^2)
    (https://dlmf.nist.gov/8.17), by bisection, to 12 digits. Raises UsageError for p outside 0..1.
    """
    if not 0 < p < 1 or degrees <= 0:
        raise UsageError(f"there is no {p} quantile of Student's t with {degrees} degrees")
    if p < 0.5:
        return -t_quantile(1 - p, degrees)
    low, high = 0.0, 1.0
    while _t_tail(high, degrees) > 1 - p:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _t_tail(middle, degrees) > 1 - p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_tail(t: float, degrees: float) -> float:
    """The probability of a value above ``t`` >= 0."""
    return _beta_share(degrees / (degrees + t * t), degrees / 2, 0.5) / 2


def _beta_share(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b).

    The continued fraction https://dlmf.nist.gov/8.17.E22, on the side where it converges quickly.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_share(1 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x) - math.log(a)
    log_front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), by Lentz's method (https://dlmf.nist.gov/3.10)."""
    value, above, below = 1.0, 1.0, 0.0
    term = 0
    while True:
        term += 1
        m = term // 2
        if term % 2:
            step = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1)) * x
        else:
            step = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m)) * x
        below = 1 / ((1 + step * below) or 1e-300)
        above = (1 + step / above) or 1e-300
        value *= above * below
        if abs(above * below - 1) < 1e-15:
            return value
