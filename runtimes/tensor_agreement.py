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
from edgekit.preprocess import Preprocessing, encoders
from edgekit.receipt import Agreement
from edgekit.runtime import TensorSession
from edgekit.runtimes import pooling
from edgekit.runtimes.ort_towers import TwoEncoders
from edgekit.sample_inputs import Samples
from edgekit.tensor_figures import Accuracy, Ranking

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


def ranking(
    product: TwoEncoders,
    reference: TwoEncoders,
    feeds: Sequence[Sequence[Mapping[str, Any]]],
    steps: Preprocessing,
) -> Ranking:
    """How both rank all texts for every image; ``feeds`` are those of the images, then the texts'.

    Spearman's rank correlation: https://en.wikipedia.org/wiki/Spearman%27s_rank_correlation.
    """
    assert steps.matching is not None
    alike = [_likeness(side, feeds, steps) for side in (product, reference)]
    mine, theirs = alike
    ranks = [_ranks(side) for side in alike]
    hits = int((mine.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    return Ranking(
        images=mine.shape[0],
        texts=mine.shape[1],
        top1=intervals.proportion(hits, mine.shape[0]),
        order=intervals.mean([_cosine(a, b) for a, b in zip(*ranks, strict=True)]),
        max_error=float(np.abs(mine - theirs).max()),
    )


def accuracy(
    product: TensorSession,
    reference: TensorSession,
    rows: Sequence[tuple[Mapping[str, Any], int]],
    data: tuple[str, str],
    progress: Progress,
) -> Accuracy:
    """How often the likeliest class of each is the right one; ``data`` is its name and hash."""
    hits: list[list[int]] = [[], []]
    for number, (feed, index) in enumerate(rows):
        progress("count right classes", number, len(rows))
        for side, session in enumerate((product, reference)):
            logits = next(iter(session.run(feed).values())).reshape(-1)
            hits[side].append(int(logits.argmax() == index))
    progress("count right classes", len(rows), len(rows))
    mine, theirs = hits
    return Accuracy(
        data=data[0],
        data_sha256=data[1],
        samples=len(rows),
        product=intervals.proportion(sum(mine), len(rows)),
        reference=intervals.proportion(sum(theirs), len(rows)),
        difference=_difference(mine, theirs),
    )


def _difference(mine: list[int], theirs: list[int]) -> Interval:
    """Of the shares, paired. One input alone, or none that differ, leaves no spread to go by: then
    the bounds are those of a proportion with no hits (the rule of three).
    """
    found = intervals.paired(mine, theirs)
    if mine != theirs and math.isfinite(found.low):
        return found
    bound = intervals.proportion(0, len(mine)).high
    return Interval(found.value, found.value - bound, found.value + bound)


def _likeness(
    side: TwoEncoders, feeds: Sequence[Sequence[Mapping[str, Any]]], steps: Preprocessing
) -> Any:
    """float64 [images, texts]: cosines."""
    vectors = []
    for part, own, inputs in zip((side.image, side.text), encoders(steps), feeds, strict=True):
        rows = [pooling.vectors(next(iter(part.run(f).values())), f, own)[0] for f in inputs]
        found = np.asarray(rows, np.float64)
        vectors.append(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12))
    images, texts = vectors
    return images @ texts.T


def _ranks(likeness: Any) -> Any:
    """Of every row the ranks, less their mean: their cosine is Spearman's correlation."""
    ranks = likeness.argsort(axis=1, kind="stable").argsort(axis=1).astype(np.float64)
    return ranks - ranks.mean(axis=1, keepdims=True)


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
