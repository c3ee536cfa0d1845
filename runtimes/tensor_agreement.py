"""Whether two graphs answer alike: cosines, errors, classes and neighbours on the same inputs.

Knows arrays and sessions; never what a figure is good for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit import intervals
from edgekit.errors import ParityError
from edgekit.exporter import Progress
from edgekit.intervals import Interval
from edgekit.preprocess import Preprocessing
from edgekit.receipt import Agreement
from edgekit.runtime import TensorSession
from edgekit.runtimes import pooling
from edgekit.sample_inputs import Samples

_VECTORS = ("text-embedding", "image-features")


def measure(
    product: TensorSession,
    reference: TensorSession,
    samples: Samples,
    steps: Preprocessing,
    progress: Progress,
) -> Agreement:
    """Run both on every sample and compare their outputs, or the vectors made of the first ones.

    A sample of several outputs counts with the worst of them. Raises ParityError for another shape,
    and for what is no number where the reference has one.
    """
    pairs = _answers(product, reference, samples.feeds, progress)
    return _agreement(pairs, samples, steps)


def _answers(
    product: TensorSession,
    reference: TensorSession,
    feeds: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> list[tuple[Any, Any, Mapping[str, Any]]]:
    """All outputs of both for every sample. Raises ParityError for what is no answer."""
    pairs = []
    for number, feed in enumerate(feeds):
        progress("compare answers", number, len(feeds))
        mine, theirs = (list(side.run(feed).values()) for side in (product, reference))
        for own, other in zip(mine, theirs, strict=True):
            if own.shape != other.shape:
                raise ParityError(
                    f"the exported file answers in the shape {own.shape}, its source {other.shape}"
                )
            if not np.isfinite(own).all() and np.isfinite(other).all():
                raise ParityError("the exported file computes what is no number")
        pairs.append((mine, theirs, feed))
    progress("compare answers", len(feeds), len(feeds))
    return pairs


def _agreement(
    pairs: Sequence[tuple[Any, Any, Mapping[str, Any]]],
    found: Samples,
    steps: Preprocessing,
) -> Agreement:
    rows = [[_rows(side, feed, steps) for side in pair] for *pair, feed in pairs]
    cosines = [min(map(_cosine, *row)) for row in rows]
    mine, theirs = ([row[i][0] for row in rows] for i in (0, 1))
    classifies = steps.task.endswith("classification")
    return Agreement(
        data=found.name,
        data_sha256=found.sha256,
        samples=len(rows),
        cosine=intervals.mean(cosines),
        least_cosine=min(cosines),
        max_error=max(
            float(np.abs(a - b).max()) for row in rows for a, b in zip(*row, strict=True)
        ),
        mean_kl=_mean_kl(mine, theirs) if classifies else None,
        top1=_top(mine, theirs, 1) if classifies else None,
        top5=_top(mine, theirs, 5) if classifies and len(mine[0]) > 5 else None,
        neighbours=_neighbours(mine, theirs) if steps.task in _VECTORS else None,
    )


def _rows(outputs: list[Any], feed: Mapping[str, Any], steps: Preprocessing) -> list[Any]:
    """float64 [values] of every output; of an encoder the one vector that is made of the first."""
    if steps.task in _VECTORS:
        outputs = [pooling.vectors(outputs[0], feed, steps)]
    return [output.reshape(-1).astype(np.float64) for output in outputs]


def _largest_error(mine: list[Any], theirs: list[Any]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(mine, theirs, strict=True))


def _cosine(a: Any, b: Any) -> float:
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length else float(not (a.any() or b.any()))


def _mean_kl(mine: Sequence[Any], theirs: Sequence[Any]) -> Interval:
    """D(reference || product) of the softmax, in nats."""
    logs = [[_log_softmax(row) for row in side] for side in (mine, theirs)]
    return intervals.mean([float((np.exp(q) * (q - p)).sum()) for p, q in zip(*logs, strict=True)])


def _log_softmax(row: Any) -> Any:
    shifted = row - row.max()
    return shifted - math.log(np.exp(shifted).sum())


def _top(mine: Sequence[Any], theirs: Sequence[Any], count: int) -> Interval:
    """How often the reference's class is among the product's ``count`` likeliest."""
    pairs = zip(mine, theirs, strict=True)
    hits = sum(int(b.argmax()) in np.argsort(-a, kind="stable")[:count] for a, b in pairs)
    return intervals.proportion(hits, len(mine))


def _neighbours(mine: Sequence[Any], theirs: Sequence[Any]) -> Interval | None:
    """How often a sample's nearest neighbour among the others is the same."""
    if len(mine) < 3:
        return None
    nearest = []
    for side in (mine, theirs):
        rows = np.stack([row / (np.linalg.norm(row) or 1.0) for row in side])
        likeness = rows @ rows.T
        np.fill_diagonal(likeness, -np.inf)
        nearest.append(likeness.argmax(axis=1))
    return intervals.proportion(int((nearest[0] == nearest[1]).sum()), len(mine))
