"""What came of holding a model's answers against those of the same model in another file.

Knows figures and the limits that they are within or not; never measures or sets one.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.intervals import Interval


@dataclass(frozen=True)
class Figure:
    """``value`` must be at most ``limit`` where ``name`` is "mean_kl" (nats), at least else: a
    "cosine", or the share of tokens, classes ("top1") or "neighbours" that are the same. ``given``:
    the limit is the user's own.
    """

    name: str
    value: Interval
    limit: float
    given: bool

    @property
    def within(self) -> bool:
        if self.name == "mean_kl":
            return self.value.value <= self.limit
        return self.value.value >= self.limit


@dataclass(frozen=True)
class Beside:
    """The other file: ``form`` is its format and type, ``sha256`` its artifact's (None: a bare
    file). The figures are over ``samples`` inputs or tokens of ``data``; ``part`` is "" or, of two
    encoders, "images" or "texts". ``notes`` are what makes the comparison less sure.
    """

    form: str
    sha256: str | None
    part: str
    data: str
    samples: int
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()
