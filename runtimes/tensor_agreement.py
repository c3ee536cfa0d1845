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
    """Run both on every sample and compare their first outputs, or the vectors made of them.

    Raises ParityError for another shape, and for what is no number where the reference has one.
    """
    pairs = _answers(product, reference, samples.feeds, progress)
    return _agreement(pairs, samples, steps)


def _answers(
    product: TensorSession,
    reference: TensorSession,
    feeds: Sequence[Mapping[str, Any]],
    progress: Progress,
) -> list[tuple[Any, Any, Mapping[str, Any]]]:
    """The first output of both for every sample. Raises ParityError for what is no answer."""
    pairs = []
    for number, feed in enumerate(feeds):
        progress("compare answers", number, len(feeds))
        (mine, *_), (theirs, *_) = (list(s.run(feed).values()) for s in (product, reference))
        if mine.shape != theirs.shape:
            raise ParityError(
                f"the exported file answers in the shape {mine.shape}, its source {theirs.shape}"
            )
        if not np.isfinite(mine).all() and np.isfinite(theirs).all():
            raise ParityError("the exported file computes what is no number")
        pairs.append((mine, theirs, feed))
    progress("compare answers", len(feeds), len(feeds))
    return pairs


def _agreement(
    pairs: Sequence[tuple[Any, Any, Mapping[str, Any]]],
    found: Samples,
    steps: Preprocessing,
) -> Agreement:
    if steps.task in _VECTORS:
        rows = [[pooling.vectors(side, feed, steps)[0] for side in pair] for *pair, feed in pairs]
    else:
        rows = [[side.reshape(-1) for side in pair] for *pair, _ in pairs]
    mine, theirs = ([row[i].astype(np.float64) for row in rows] for i in (0, 1))
    cosines = [_cosine(a, b) for a, b in zip(mine, theirs, strict=True)]
    classifies = steps.task.endswith("classification")
    return Agreement(
        data=found.name,
        data_sha256=found.sha256,
        samples=len(rows),
        cosine=intervals.mean(cosines),
        least_cosine=min(cosines),
        max_error=max(float(np.abs(a - b).max()) for a, b in zip(mine, theirs, strict=True)),
        mean_kl=_mean_kl(mine, theirs) if classifies else None,
        top1=_top(mine, theirs, 1) if classifies else None,
        top5=_top(mine, theirs, 5) if classifies and len(mine[0]) > 5 else None,
        neighbours=_neighbours(mine, theirs) if steps.task in _VECTORS else None,
    )


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
