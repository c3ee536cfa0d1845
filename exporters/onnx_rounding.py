"""One matrix to 8 bits with a scale for each output, so that its products keep what they were.

Knows arrays alone; never a graph. Every row is rounded in turn, and the rows that are still to come
take up the error as far as the inputs are correlated (GPTQ, https://arxiv.org/abs/2210.17323,
algorithm 1): where a few inputs are large, rounding each weight to the nearest costs most of what
8 bits cost at all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_TOP = 127
_BLOCK = 64
_SHRINKS = (1.0, 0.95, 0.9, 0.85)  # parts of a column's range that are tried
# Added to the diagonal of X'X, for samples are few: of the diagonal itself, and of its mean.
_TRUST, _DAMPING = 0.1, 1e-3


def fit(weights: Any, rows: Any) -> tuple[Any, Any]:
    """float32 [inputs, outputs] -> int8 of that shape, and float32 scales [outputs]: w = scale q;
    ``rows`` are inputs, float32 [rows, inputs].
    """
    square = _damped(rows)
    scales = _scales(weights, np.diag(square).astype(np.float32))
    # Upper triangular: inverse = U'U.
    upper = np.linalg.cholesky(np.linalg.inv(square)).T.astype(np.float32)
    rest = weights.astype(np.float32)
    quantized = np.empty(weights.shape, np.int8)
    for start in range(0, len(weights), _BLOCK):
        part = rest[start : start + _BLOCK]
        errors = np.empty_like(part)
        for row in range(len(part)):
            place = start + row
            found = np.clip(np.rint(part[row] / scales), -_TOP, _TOP)
            quantized[place] = found
            errors[row] = (part[row] - found * scales) / upper[place, place]
            behind = upper[place, place + 1 : start + len(part)]
            part[row + 1 :] -= np.outer(behind, errors[row])
        end = start + len(part)
        rest[end:] -= upper[start:end, end:].T @ errors
    return quantized, scales


def _damped(rows: Any) -> Any:
    """X'X, float64 [inputs, inputs], its mean diagonal 1, and invertible."""
    wide = rows.astype(np.float64)
    square = wide.T @ wide
    square /= max(1e-30, float(np.diag(square).mean()))
    places = np.diag_indices(len(square))
    square[places] += _TRUST * np.diag(square) + _DAMPING
    return square


def _scales(weights: Any, importance: Any) -> Any:
    """Of each column, the one that leaves the least error of rounding to the nearest."""
    largest = np.abs(weights).max(axis=0).astype(np.float32)
    least = np.full_like(largest, np.inf)
    best = np.ones_like(largest)
    for shrink in _SHRINKS:
        scales = np.where(largest > 0, largest * np.float32(shrink / _TOP), np.float32(1))
        off = np.clip(np.rint(weights / scales), -_TOP, _TOP) * scales - weights
        found = importance @ off**2
        best = np.where(found < least, scales, best)
        least = np.minimum(found, least)
    return best.astype(np.float32)
