"""One matrix to blocks of 4 bits, so that its outputs keep what they were: GPTQ, then descent.

Knows arrays alone; never a model, nor where the inputs of a matrix come from.

First every column is rounded in turn, and the columns that are still to come take up the error as
far as the inputs are correlated (GPTQ, https://arxiv.org/abs/2210.17323, algorithm 1). Then each
value is rounded again with all others known, and each scale is fitted to its block: coordinate
descent on the error of the outputs (https://arxiv.org/abs/2309.01885), which never gets worse.
"""

from __future__ import annotations

import numpy as np

from edgekit.exporters import lm_blocks
from edgekit.exporters.lm_blocks import Array
from edgekit.exporters.lm_graph import Blocks

_BITS = 4
_TOP = np.float32((1 << _BITS) - 1)
# Added to the diagonal of X'X, for a text is only a sample: of the diagonal itself, which takes the
# step towards rounding by importance alone (0.1 and 0.03 lost more of SmolLM2 on text that nothing
# was fitted to), and of its mean, which keeps it invertible.
_TRUST, _DAMPING = 0.3, 1e-4
_SWEEPS = 3  # over all blocks


def fit(weights: Array, square: Array, size: int) -> tuple[Blocks, float]:
    """Round ``weights``, float32 [outputs, inputs], in blocks of ``size``, given X'X of its inputs.

    Also the error of the outputs that rounding leaves, as a share of their power.
    """
    inputs = weights.shape[1]
    hessian = _hessian(square)
    target = weights.T.copy()
    target[np.diag(square) == 0] = 0
    padded = -inputs % size
    target = np.pad(target, ((0, padded), (0, 0)))
    hessian = np.pad(hessian, ((0, padded), (0, padded)))
    rest = np.arange(inputs, inputs + padded)
    hessian[rest, rest] = 1
    q, scales, zeros = _fed_forward(target, hessian, size)
    hessian = hessian.astype(np.float32)
    _descend(target, hessian, q, scales, zeros)
    error = (q - np.repeat(zeros, size, 0)) * np.repeat(scales, size, 0) - target
    lost, power = (
        float(np.einsum("io,io->", square @ each[:inputs], each[:inputs]))
        for each in (error, target)
    )
    grid = np.ascontiguousarray(q.T).reshape(len(weights), -1, size)
    return lm_blocks.pack(grid, scales.T, zeros.T, _BITS, inputs), lost / max(power, 1e-30)


def _hessian(square: Array) -> Array:
    """X'X, float64, its mean diagonal 1, with what keeps a sample from being believed too much."""
    hessian: Array = square.astype(np.float64)
    diagonal = np.diag(hessian).copy()
    unused = diagonal == 0
    mean = diagonal.mean() or 1.0
    diagonal[unused] = mean
    places = np.diag_indices(len(hessian))
    hessian[unused, unused] = mean
    hessian[places] += _TRUST * diagonal + _DAMPING * mean
    hessian /= mean
    return hessian


def _fed_forward(target: Array, hessian: Array, size: int) -> tuple[Array, Array, Array]:
    """GPTQ: q [inputs, outputs], scales and zeros [blocks, outputs]; float32."""
    inputs, outputs = target.shape
    # Upper triangular: inverse = U'U.
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T.astype(np.float32)
    importance = np.diag(upper) ** -2
    rest = target.copy()
    q = np.empty((inputs, outputs), np.float32)
    scales = np.empty((inputs // size, outputs), np.float32)
    zeros = np.empty_like(scales)
    for block, start in enumerate(range(0, inputs, size)):
        end = start + size
        part = rest[start:end]
        found = lm_blocks.grid(np.ascontiguousarray(part.T), importance[start:end], _BITS)
        scale, zero = scales[block], zeros[block] = [each[:, 0] for each in found]
        errors = np.empty_like(part)
        for row in range(size):
            column = start + row
            q[column] = np.clip(np.rint(part[row] / scale) + zero, 0, _TOP)
            errors[row] = (part[row] - (q[column] - zero) * scale) / upper[column, column]
            part[row + 1 :] -= np.outer(upper[column, column + 1 : end], errors[row])
        rest[end:] -= upper[start:end, end:].T @ errors
    return q, scales, zeros


def _descend(target: Array, hessian: Array, q: Array, scales: Array, zeros: Array) -> None:
    """Improve ``q`` and ``scales`` in place, block after block."""
    size = len(q) // len(scales)
    error = (q - np.repeat(zeros, size, 0)) * np.repeat(scales, size, 0) - target
    slope = hessian @ error
    for _ in range(_SWEEPS):
        for block, start in enumerate(range(0, len(q), size)):
            rows = slice(start, start + size)
            within = hessian[rows, rows]
            own, zero, old = q[rows], zeros[block], scales[block].copy()
            before = (own - zero) * old
            steps = own - zero
            bent = within @ steps
            curve = (steps * bent).sum(axis=0)
            change = (steps * slope[rows]).sum(axis=0) / np.maximum(curve, 1e-12)
            scale = np.where(curve > 0, lm_blocks.halved(old - change), old)
            # Half floats are coarse: what is rounded past the best place may be worse than before.
            moved = scale - old
            scale = np.where((2 * change + moved) * moved < 0, scale, old)
            moved = scale - old
            near = slope[rows] + bent * moved
            value = steps * scale
            for row in range(size):
                best = value[row] - near[row] / within[row, row]
                own[row] = np.clip(np.rint(best / scale) + zero, 0, _TOP)
                step = (own[row] - zero) * scale - value[row]
                near += np.outer(within[:, row], step)
            scales[block] = scale
            slope += hessian[:, rows] @ ((own - zero) * scale - before)
