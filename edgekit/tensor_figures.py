"""Further figures of a receipt, of models that are no language models: classes with their truth,
two encoders, kernel fusion, and what each layer loses.

Knows figures alone; never measures one, and knows no engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.intervals import Interval


@dataclass(frozen=True)
class PassTrial:
    """A pass of kernel fusion that fired ``fired`` times. ``ratio`` is the time of a run with it
    over that without it, on the machine of the export, None where it was not measured; ``kept``
    False: it was slower, and the graph goes without it.
    """

    name: str
    fired: int
    ratio: float | None
    kept: bool


@dataclass(frozen=True)
class Ranking:
    """Of two encoders: how each image ranks the texts, against the float model's ranking.

    ``top1`` is the share of images whose likeliest text is the same, ``order`` the mean of
    Spearman's rank correlation over the images, ``max_error`` the largest difference of a cosine.
    """

    images: int
    texts: int
    top1: Interval
    order: Interval
    max_error: float


@dataclass(frozen=True)
class LayerLoss:
    """A value inside a graph: ``layer`` is the operator that makes it, of the kind ``op``.

    ``snr_db`` is 10 log10 of the float model's power over the error's; ``drop_db`` how far that is
    below what goes in: what this layer loses itself.
    """

    layer: str
    op: str
    tensor: str
    snr_db: float
    drop_db: float


@dataclass(frozen=True)
class LayerLosses:
    """What each layer loses, in the order of the graph; ``first`` is the one that loses most by
    itself, None where no layer loses much more than those before it. ``shared`` counts the values
    that both graphs have, of ``whole`` in the float one: fused operators have none inside.
    """

    samples: int
    shared: int
    whole: int
    first: LayerLoss | None
    layers: tuple[LayerLoss, ...]


@dataclass(frozen=True)
class Accuracy:
    """How often the likeliest class is the right one, on the user's own labelled inputs.

    ``difference`` is the product's share less the float model's on the same inputs, whose errors
    mostly coincide, so that its interval is the narrower one.
    """

    data: str
    data_sha256: str
    samples: int
    product: Interval
    reference: Interval
    difference: Interval
