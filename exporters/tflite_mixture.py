"""Which operators of a quantized graph are better left in float: those that cost most agreement for
what they save.

Knows operators' sizes and a loss that it is given; never how a file is quantized or run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

from edgekit import tflite_cost
from edgekit.formats.tflite import TfliteHeader

# Of all weights and of all multiplications, so much may stay float: the file and the time grow.
_WEIGHTS, _WORK = 0.05, 0.15
_MOST_TRIALS = 64  # operators beyond that are tried in groups of neighbours
_WORTH = 0.02  # of the loss: what leaving one more group in float must save
_MISSES = 3  # groups in a row that are not worth it, before the search ends

# The loss with these operators (names of their first outputs) in float.
Loss = Callable[[Set[str]], float]


@dataclass(frozen=True)
class Group:
    """Operators that are left in float together: names of outputs, and shares of the whole."""

    names: tuple[str, ...]
    weights: float
    work: float


@dataclass(frozen=True)
class Mixture:
    """``floats`` and the loss with them, of ``trials`` measurements; ``before`` is that without."""

    floats: frozenset[str]
    loss: float
    before: float
    trials: int


def search(
    header: TfliteHeader, kept: Set[str], loss: Loss, on_trial: Callable[[], None]
) -> Mixture:
    """Leave out one group after the other, then keep those in float that save most of the loss, the
    best first, as long as each is worth it and the shares above suffice. ``kept`` are float anyway.
    """
    floats, now = frozenset(kept), loss(kept)
    before, trials = now, 1
    gains: list[tuple[float, Group]] = []
    for group in groups(header):
        if not set(group.names) <= kept:
            gains.append((before - loss({*kept, *group.names}), group))
            trials += 1
            on_trial()
    weights = work = 0.0
    misses = 0
    for gain, group in sorted(gains, key=lambda pair: -pair[0]):
        if gain <= 0 or misses == _MISSES:
            break
        if weights + group.weights > _WEIGHTS or work + group.work > _WORK:
            continue
        found = loss(floats | set(group.names))
        trials += 1
        if found < (1 - _WORTH) * now:
            floats, now, misses = floats | set(group.names), found, 0
            weights, work = weights + group.weights, work + group.work
        else:
            misses += 1
    return Mixture(floats - kept, now, before, trials)


def groups(header: TfliteHeader) -> Iterator[Group]:
    """Operators with weights, in the graph's order; neighbours together where there are many."""
    tensors = header.main.tensors
    rows = []
    for operator in header.main.operators:
        given = [tensors[number] for number in operator.inputs if number >= 0]
        macs = tflite_cost.macs(operator, given, [tensors[n] for n in operator.outputs])
        weights = sum(tensor.elements for tensor in given[1:] if tensor.buffer is not None)
        if macs and weights and operator.outputs:
            rows.append((tensors[operator.outputs[0]].name, weights, macs))
    all_weights = sum(weights for _, weights, _ in rows) or 1
    all_work = sum(macs for _, _, macs in rows) or 1.0
    size = math.ceil(len(rows) / _MOST_TRIALS) or 1
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        yield Group(
            tuple(name for name, _, _ in some),
            sum(weights for _, weights, _ in some) / all_weights,
            sum(macs for _, _, macs in some) / all_work,
        )
