"""What a sensitivity run found: rows of figures, and the answer to "which model loses more?".

Knows figures and words; never how they were measured, drawn or printed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgekit.intervals import Interval

# Stored sizes further apart than this are said: the same name is then not the same precision.
_UNLIKE_SIZES = 1.1
# So are models further apart than this in the bits that they need for a byte of the text.
_UNLIKE_STRENGTHS = 1.25


@dataclass(frozen=True)
class BitsRow:
    """A model at one width: its preset's type, the file, and what it lost against its floats.

    ``mean_kl`` is in nats per token. ``bytes_per_token`` belongs to the model's tokenizer.
    """

    bits: int
    type: str
    bits_per_weight: float
    size_bytes: int
    tokens: int
    mean_kl: Interval
    top1: Interval
    perplexity_ratio: Interval
    bytes_per_token: float

    @property
    def kl_per_byte(self) -> Interval:
        """Bits per byte of text: models that cut a text into other tokens can be compared."""
        return _each(self.mean_kl, lambda nats: nats / math.log(2) / self.bytes_per_token)

    @property
    def extra_bits_per_byte(self) -> Interval:
        """How much worse the text itself is predicted: log2 of the perplexity ratio, per byte."""
        return _each(
            self.perplexity_ratio,
            lambda ratio: math.log2(ratio) / self.bytes_per_token if ratio > 0 else -math.inf,
        )


@dataclass(frozen=True)
class PartRow:
    """One kind of tensor (``attn_q``) or one layer ("3") quantized alone.

    ``types`` are those that its tensors really got; ``mean_kl`` is in nats per token.
    """

    name: str
    types: tuple[str, ...]
    share_of_weights: float
    mean_kl: Interval


@dataclass(frozen=True)
class InputRow:
    """The spread of one matrix's input; ``layer`` None for matrices outside of all layers."""

    kind: str
    layer: int | None
    kurtosis: float
    max_to_median: float


@dataclass(frozen=True)
class ModelRows:
    """All figures of one model. ``quantized`` names the type of a source that is no float model."""

    name: str
    family: str
    quantized: str | None
    bytes_per_token: float
    reference_perplexity: float
    reference_bits_per_byte: float
    bits: tuple[BitsRow, ...]
    kinds: tuple[PartRow, ...] = ()
    layers: tuple[PartRow, ...] = ()
    inputs: tuple[InputRow, ...] = ()


@dataclass(frozen=True)
class Answer:
    """Two models compared: at each width the one that loses more, None where nothing is shown.

    A difference is shown where the 95% intervals of the KL divergence do not meet.
    """

    models: tuple[str, str]
    per_byte: dict[int, str | None]
    per_token: dict[int, str | None]
    sentence: str


@dataclass(frozen=True)
class Report:
    """Everything that ``edgekit.sensitivity`` measured. ``part_bits``: the width of the parts."""

    models: tuple[ModelRows, ...]
    answers: tuple[Answer, ...]
    n_ctx: int
    text_bytes: int
    text_sha256: str
    part_bytes: int
    part_bits: int

    @property
    def notes(self) -> list[str]:
        """What a reader must know before believing the figures."""
        return [*_grids(self.models), *_sizes(self.models), *_strengths(self.models)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an open end is None."""
        body: dict[str, Any] = _finite(asdict(self))
        for rows, model in zip(body["models"], self.models, strict=True):
            for row, found in zip(rows["bits"], model.bits, strict=True):
                row["kl_per_byte"] = found.kl_per_byte.to_dict()
                row["extra_bits_per_byte"] = found.extra_bits_per_byte.to_dict()
        return body | {"notes": self.notes}


def answers(models: Sequence[ModelRows]) -> Iterator[Answer]:
    """An answer for every pair of models, over the widths that both have."""
    for one, other in itertools.combinations(models, 2):
        per_byte = _more(one, other, lambda row: row.kl_per_byte)
        per_token = _more(one, other, lambda row: row.mean_kl)
        words = [_by_byte(one, other, per_byte)]
        if per_token != per_byte:
            words.append(_by_token(one, other, per_byte, per_token))
        yield Answer((one.name, other.name), per_byte, per_token, " ".join(words))


def _more(
    one: ModelRows, other: ModelRows, figure: Callable[[BitsRow], Interval]
) -> dict[int, str | None]:
    """Width -> the model whose interval lies wholly above the other's."""
    found: dict[int, str | None] = {}
    for mine, theirs in _pairs(one, other):
        a, b = figure(mine), figure(theirs)
        found[mine.bits] = one.name if a.low > b.high else other.name if b.low > a.high else None
    return found


def _pairs(one: ModelRows, other: ModelRows) -> list[tuple[BitsRow, BitsRow]]:
    theirs = {row.bits: row for row in other.bits}
    return [(row, theirs[row.bits]) for row in one.bits if row.bits in theirs]


def _by_byte(one: ModelRows, other: ModelRows, per_byte: dict[int, str | None]) -> str:
    """The answer in words, by KL divergence per byte of text."""
    widths = {
        name: [bits for bits, more in per_byte.items() if more == name]
        for name in (one.name, other.name, None)
    }
    parts = []
    for model, rival in ((one, other), (other, one)):
        if shown := widths[model.name]:
            ratios = [
                mine.mean_kl.value
                / model.bytes_per_token
                * rival.bytes_per_token
                / theirs.mean_kl.value
                for mine, theirs in _pairs(model, rival)
                if mine.bits in shown and theirs.mean_kl.value > 0
            ]
            parts.append(
                f"{model.name} is more sensitive than {rival.name} at {_bits(shown)}"
                + (f" ({_range(ratios)} the KL divergence per byte of text)" if ratios else "")
            )
    if not parts:
        return (
            f"No difference shown between {one.name} and {other.name} at {_bits(widths[None])}:"
            " the intervals of their KL divergence per byte of text overlap."
        )
    if widths[None]:
        parts.append(f"no difference shown at {_bits(widths[None])}")
    return "; ".join(parts) + "."


def _by_token(
    one: ModelRows,
    other: ModelRows,
    per_byte: dict[int, str | None],
    per_token: dict[int, str | None],
) -> str:
    """Where counting per token says something else, and why."""
    unlike: dict[str | None, list[int]] = {}
    for bits, more in per_token.items():
        if more != per_byte[bits]:
            unlike.setdefault(more, []).append(bits)
    parts = [
        f"{name} is the more sensitive at {_bits(widths)}"
        if name
        else f"no difference is shown at {_bits(widths)}"
        for name, widths in unlike.items()
    ]
    return (
        f"Per token {' and '.join(parts)}: a token of {one.name} is {one.bytes_per_token:.1f} bytes"
        f" of this text, one of {other.name} {other.bytes_per_token:.1f}."
    )


def _bits(widths: Sequence[int]) -> str:
    """``[4, 3, 2]`` -> ``4, 3 and 2 bits``."""
    *first, last = [str(width) for width in widths]
    return f"{', '.join(first)} and {last} bits" if first else f"{last} bits"


def _range(ratios: Sequence[float]) -> str:
    low, high = (f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in (min(ratios), max(ratios)))
    return f"{low} times" if low == high else f"{low} to {high} times"


def _grids(models: Sequence[ModelRows]) -> Iterator[str]:
    for model in models:
        if model.quantized:
            yield (
                f"{model.name} starts from {model.quantized} weights, which lie on a grid that"
                " flatters some types: `edgekit convert --off-grid` makes a fair float model of it"
            )


def _sizes(models: Sequence[ModelRows]) -> Iterator[str]:
    """The same preset may store more bits where a model's rows do not fit its blocks."""
    for one, other in itertools.combinations(models, 2):
        unlike = [
            (mine, theirs)
            for mine, theirs in _pairs(one, other)
            if not 1 / _UNLIKE_SIZES < mine.bits_per_weight / theirs.bits_per_weight < _UNLIKE_SIZES
        ]
        if unlike:
            mine, theirs = unlike[-1]
            yield (
                f"{one.name} and {other.name} are not stored alike at"
                f" {_bits([row.bits for row, _ in unlike])}: {mine.bits_per_weight:.1f} and"
                f" {theirs.bits_per_weight:.1f} bits per weight at the last; read the plot, which"
                " has stored bits on its axis"
            )


def _strengths(models: Sequence[ModelRows]) -> Iterator[str]:
    for pair in itertools.combinations(models, 2):
        strong, weak = sorted(pair, key=lambda model: model.reference_bits_per_byte)
        if weak.reference_bits_per_byte > _UNLIKE_STRENGTHS * strong.reference_bits_per_byte:
            yield (
                f"the floats of {strong.name} need {strong.reference_bits_per_byte:.2f} bits for a"
                f" byte of this text, those of {weak.name} {weak.reference_bits_per_byte:.2f}: a"
                " model that predicts less has less to lose"
            )


def _each(interval: Interval, change: Callable[[float], float]) -> Interval:
    """A growing function of all three numbers."""
    return Interval(*(change(x) if math.isfinite(x) else x for x in vars(interval).values()))


def _finite(body: Any) -> Any:
    if isinstance(body, dict):
        return {str(key): _finite(value) for key, value in body.items()}
    if isinstance(body, list | tuple):
        return [_finite(value) for value in body]
    return None if isinstance(body, float) and not math.isfinite(body) else body
