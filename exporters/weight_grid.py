"""Finds the grid of few levels that training left the rows of a weight on.

Knows numbers alone: no graph, no file, and not who trained. A row that lies on no grid is told as
such, never rounded to one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_TOP = 8  # levels of 4 bits: -8 to 7
# Of a step: what rounding to float32 moves a value of the grid by, with room to spare.
_OFF = 1e-4


def of_rows(weights: Any) -> tuple[Any, Any] | None:
    """float32 [outputs, inputs] -> (int8 levels [outputs, inputs] from -8 to 7, float32 steps
    [outputs]) with ``weights == levels * steps`` but for the rounding of float32; None where a row
    has values between the levels.

    The largest value of a row is a whole number of steps, from 1 to 8: the fewest that put all its
    values on whole numbers are taken.
    """
    largest = np.abs(weights).max(axis=1).astype(np.float64)
    steps = np.ones(len(weights))
    levels = np.zeros(weights.shape, np.int8)
    open_rows = largest > 0  # a row of zeros is on any grid
    for top in range(1, _TOP + 1):
        rows = np.flatnonzero(open_rows)
        if not len(rows):
            break
        step = largest[rows] / top
        values = weights[rows] / step[:, None]
        whole = np.rint(values)
        fits = (np.abs(values - whole).max(axis=1) < _OFF) & (whole.max(axis=1) < _TOP)
        steps[rows[fits]] = step[fits]
        levels[rows[fits]] = whole[fits].astype(np.int8)
        open_rows[rows[fits]] = False
    return None if open_rows.any() else (levels, steps.astype(np.float32))
