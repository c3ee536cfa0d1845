"""How sure the difference of two models is that answered the same questions: a paired bootstrap.

Knows numbers alone; never what they measure.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    if len(a) != len(b) or not a:
        raise UsageError(f"{len(a)} and {len(b)} values make no pairs")
    gains = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    means = torch.stack(
        [
            gains[torch.randint(len(gains), (len(gains),), generator=generator)].mean()
            for _ in range(_DRAWS)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(gains.mean()), low, high)
