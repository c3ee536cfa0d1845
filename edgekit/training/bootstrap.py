"""How sure the difference of two models is that answered the same questions: a paired bootstrap.

Knows numbers alone; never what they measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from edgekit.errors import UsageError
from edgekit.intervals import Interval

_DRAWS = 2000


def paired(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean of ``a - b``, pair by pair, with the percentile interval of its bootstrap: pairs are
    drawn anew, with replacement, as many as there are (Efron and Tibshirani 1993, "An Introduction
    to the Bootstrap", section 13.3). The same values give the same interval.

    Raises UsageError when the sides differ in length, or are empty.
    """
    _check(a, b)
    gains = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    means = torch.stack([gains[numbers].mean() for numbers in _resamples(len(gains))])
    return Interval(float(gains.mean()), *_middle(means, confidence))


def ratio(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The sum of ``a`` over the sum of ``b``, and the percentile interval of its bootstrap, with
    the same resamples as ``paired``. It says little where the sum of ``b`` may well be 0.

    Raises UsageError when the sides differ in length, or are empty.
    """
    _check(a, b)
    both = torch.tensor([list(a), list(b)], dtype=torch.float64)
    sums = torch.stack([both[:, numbers].sum(1) for numbers in _resamples(len(a))])
    whole = both.sum(1)
    return Interval(float(whole[0] / whole[1]), *_middle(sums[:, 0] / sums[:, 1], confidence))


def _check(a: Sequence[float], b: Sequence[float]) -> None:
    if len(a) != len(b) or not a:
        raise UsageError(f"{len(a)} and {len(b)} values make no pairs")


def _resamples(count: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        yield torch.randint(count, (count,), generator=generator)


def _middle(values: torch.Tensor, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
