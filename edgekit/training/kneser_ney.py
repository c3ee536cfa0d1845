"""An n-gram model with interpolated modified Kneser-Ney smoothing: the baseline of language models.

Knows numbers of tokens alone; counts by sorting, so that a few million tokens take seconds.

Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 3
(equations 20 to 26); lower orders count the different words before a gram instead of the gram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import DataError

Array = np.ndarray[Any, Any]
_MOST_BITS = 62


@dataclass(frozen=True)
class _Order:
    """Grams of one order as sorted numbers, their discounted counts over their history's total, and
    by history (sorted too) the weight that the lower order gets.
    """

    grams: Array
    shares: Array
    histories: Array
    weights: Array


class KneserNey:
    """Trained on ``tokens``, numbers below ``vocab``. The order is ``order``, or what fits in 62
    bits: 5 up to 4,096 entries, 4 up to 32,768.
    """

    def __init__(self, tokens: Array, vocab: int, order: int = 5) -> None:
        if len(tokens) < order + 1:
            raise DataError(f"{len(tokens)} tokens are too few for an n-gram model")
        self.vocab = vocab
        self.order = min(order, _MOST_BITS // max(1, (vocab - 1).bit_length()))
        grams = _coded(tokens.astype(np.int64), vocab, self.order)
        unique, counts = np.unique(grams, return_counts=True)
        orders = []
        for length in range(self.order, 0, -1):
            orders.append(_order(unique, counts, vocab))
            # The next lower order: different grams that end alike.
            unique, counts = np.unique(unique % vocab ** (length - 1), return_counts=True)
        self._orders = orders[::-1]

    def log_probabilities(self, tokens: Array) -> Array:
        """Natural logarithms for each token but the first, given those before it: float64
        [tokens - 1]. The first ones have shorter histories.
        """
        tokens = tokens.astype(np.int64)
        found = np.full(len(tokens) - 1, 1.0 / self.vocab)
        for length, order in enumerate(self._orders, 1):
            start = max(1, length - 1)  # the first token with a history of this length
            if start >= len(tokens):
                break
            grams = _coded(tokens[start - length + 1 :], self.vocab, length)
            at, there = _find(order.histories, grams // self.vocab)
            weight = np.where(there, order.weights[at], 1.0)
            at, known = _find(order.grams, grams)
            share = np.where(known, order.shares[at], 0.0)
            found[start - 1 :] = share + weight * found[start - 1 :]
        logs: Array = np.log(found)
        return logs


def _coded(tokens: Array, vocab: int, length: int) -> Array:
    """Each run of ``length`` tokens as one number, the last token in its lowest place."""
    codes = np.zeros(len(tokens) - length + 1, dtype=np.int64)
    for place in range(length):
        codes = codes * vocab + tokens[place : place + len(codes)]
    return codes


def _order(grams: Array, counts: Array, vocab: int) -> _Order:
    discount = _cuts(counts)[np.minimum(counts, 3) - 1]
    histories, first = np.unique(grams // vocab, return_index=True)
    totals = np.add.reduceat(counts, first).astype(np.float64)
    freed = np.add.reduceat(discount, first)
    lengths = np.diff(np.append(first, len(grams)))
    return _Order(
        grams, (counts - discount) / np.repeat(totals, lengths), histories, freed / totals
    )


def _cuts(counts: Array) -> Array:
    """What is taken from a count of 1, of 2, and of 3 or more: float64 [3] (equation 26). It tells
    them by how many grams have a count of 1 to 4; where there are too few for a cut above 0 and no
    larger than its count, as in KenLM, it is half of the count.
    """
    n1, n2, n3, n4 = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if min(n1, n2, n3):
        y = n1 / (n1 + 2 * n2)
        ratios = (n2 / n1, n3 / n2, n4 / n3)
        cuts = [n - (n + 1) * y * ratio for n, ratio in enumerate(ratios, 1)]
        if min(cuts) > 0:
            return np.array(cuts)
    return np.array([0.5, 1.0, 1.5])


def _find(sorted_values: Array, wanted: Array) -> tuple[Array, Array]:
    """Where each of ``wanted`` lies (anywhere, where it does not), and whether it does."""
    at = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    return at, sorted_values[at] == wanted
