"""Would other settings be faster? Compares rows of a benchmark that differ in one setting.

Knows measured rows only; never a machine's limits. Where nothing was measured it says so, and which
run would tell.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

# A gain below this is within what repeated runs of one setting differ by.
NOTHING = 1.05
_SETTINGS = ("n_threads", "n_prompt", "n_gen", "n_depth", "n_batch", "n_seqs", "kv_type")


class Row(Protocol):
    """What is read of a row of a BenchReport: settings, and the seconds of each repetition."""

    @property
    def model_type(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def n_threads(self) -> int: ...
    @property
    def n_prompt(self) -> int: ...
    @property
    def n_gen(self) -> int: ...
    @property
    def n_depth(self) -> int: ...
    @property
    def n_batch(self) -> int: ...
    @property
    def n_seqs(self) -> int: ...
    @property
    def kv_type(self) -> str: ...
    @property
    def samples_s(self) -> Sequence[float]: ...


@dataclass(frozen=True)
class Advice:
    """``helps``: True or False where it was measured, None where it was not."""

    topic: str
    helps: bool | None
    text: str


def decodes(row: Row) -> bool:
    """Whether ``row`` is about generating tokens; else it is about reading a prompt."""
    return row.n_gen > 0


def tokens(row: Row) -> int:
    """Tokens of one repetition, all sequences together."""
    return row.n_gen * row.n_seqs if decodes(row) else row.n_prompt


def tok_s(row: Row) -> float:
    """Tokens per second of the median repetition, all sequences together."""
    return tokens(row) / statistics.median(row.samples_s)


def differing(row: Row, rows: Iterable[Row], setting: str) -> list[Row]:
    """The rows with all settings of ``row`` but another ``setting``, in its order."""
    same = [name for name in _SETTINGS if name != setting]
    found = [
        other
        for other in rows
        if getattr(other, setting) != getattr(row, setting)
        and all(getattr(other, name) == getattr(row, name) for name in same)
    ]
    return sorted(found, key=lambda other: getattr(other, setting))


def advice(row: Row, rows: Sequence[Row], others: Sequence[Row]) -> list[Advice]:
    """On threads, batch size, fewer bits and a smaller context for ``row``.

    ``rows`` are of the same file, ``others`` of other files of the same model.
    """
    found = [_threads(row, rows), _bits(row, others)]
    if decodes(row):
        found += [_batch(row, rows), _context(row, rows)]
    return found


def _threads(row: Row, rows: Sequence[Row]) -> Advice:
    measured = [*differing(row, rows, "n_threads"), row]
    if len(measured) == 1:
        tries = f"1,{row.n_threads}" if row.n_threads > 1 else "1,2"
        return Advice("threads", None, f"threads: not measured: run with -t {tries}")
    fewest, *more = sorted(measured, key=lambda each: each.n_threads)
    gains = ", ".join(f"{_threads_of(each)} {_times(each, fewest)}" for each in more)
    fastest = max(measured, key=tok_s)
    best = next(each for each in (fewest, *more) if tok_s(each) * NOTHING >= tok_s(fastest))
    text = f"threads: against {_threads_of(fewest)}, {gains}: {_threads_of(best)} will do"
    return Advice("threads", best is not fewest, text)


def _bits(row: Row, others: Sequence[Row]) -> Advice:
    smaller = [
        other
        for other in others
        if other.size_bytes < row.size_bytes
        and all(getattr(other, name) == getattr(row, name) for name in _SETTINGS)
    ]
    if not smaller:
        return Advice(
            "fewer bits",
            None,
            "fewer bits: not measured: bench a file of fewer bits in the same run",
        )
    best = max(smaller, key=tok_s)
    text = (
        f"fewer bits: {best.model_type} has {best.size_bytes / row.size_bytes:.2f} times the bytes"
        f" of {row.model_type} and runs {_times(best, row)}"
    )
    return Advice("fewer bits", _gains(best, row), text)


def _batch(row: Row, rows: Sequence[Row]) -> Advice:
    larger = [each for each in differing(row, rows, "n_seqs") if each.n_seqs > row.n_seqs]
    if not larger:
        tries = f"{row.n_seqs},{row.n_seqs * 4}"
        return Advice("batch size", None, f"batch size: not measured: run with --batch {tries}")
    best = max(larger, key=tok_s)
    each_one = tok_s(best) / best.n_seqs / (tok_s(row) / row.n_seqs)
    text = (
        f"batch size: {best.n_seqs} sequences at once, against {row.n_seqs}, run"
        f" {_times(best, row)} all together, and {each_one:.2f} times as fast each"
    )
    return Advice("batch size", _gains(best, row), text)


def _context(row: Row, rows: Sequence[Row]) -> Advice:
    measured = sorted([*differing(row, rows, "n_depth"), row], key=lambda each: each.n_depth)
    if len(measured) == 1:
        tries = f"0,{row.n_depth}" if row.n_depth else "0,2048"
        return Advice(
            "smaller context", None, f"smaller context: not measured: run with --depth {tries}"
        )
    short, long = measured[0], measured[-1]
    text = (
        f"smaller context: behind {short.n_depth} tokens, against {long.n_depth},"
        f" it runs {_times(short, long)}"
    )
    return Advice("smaller context", _gains(short, long), text)


def _gains(faster: Row, slower: Row) -> bool:
    return tok_s(faster) > NOTHING * tok_s(slower)


def _times(row: Row, base: Row) -> str:
    ratio = f"{tok_s(row) / tok_s(base):.2f} times as fast"
    return f"{ratio} ({tok_s(row):.0f} against {tok_s(base):.0f} tok/s)"


def _threads_of(row: Row) -> str:
    return f"{row.n_threads} thread{'s' if row.n_threads > 1 else ''}"
