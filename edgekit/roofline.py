"""What bounds a model's speed on a machine: memory, arithmetic, or neither.

Knows timings, costs and measured limits as plain data; never runs anything. The roofline is that of
Williams, Waterman and Patterson, https://doi.org/10.1145/1498765.1498785, with the time that no
roof explains named as a third part. docs/roofline.md says how to read it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgekit import advice as advise
from edgekit.advice import NOTHING, Advice, Row, decodes, tok_s
from edgekit.errors import UsageError
from edgekit.model_cost import ModelCost, cost
from edgekit.probe import Limits

__all__ = ["Advice", "ModelCost", "Part", "Row", "RowVerdict", "Verdict", "cost", "verdict"]

# More threads that lift the roof by a quarter or more should bring half of that at least.
_LIFTED = 1.25
_FAIR_PART = 0.5


@dataclass(frozen=True)
class Part:
    """Some of the time of one token in ms, and how it is known."""

    name: str
    ms: float
    source: str


@dataclass(frozen=True)
class RowVerdict:
    """What bounds one row. Times in ms per token, rates per second.

    ``share`` is how much of the time the roof of ``kind`` ("memory" or "compute") takes; above 1
    where the row beat what was measured. For "overhead" it is the part above the higher roof.
    """

    phase: str
    n_threads: int
    n_prompt: int
    n_gen: int
    n_depth: int
    n_seqs: int
    kv_type: str
    tok_s: float
    token_ms: float
    memory_ms: float
    compute_ms: float
    read_bytes_s: float
    read_limit_bytes_s: float
    flops_s: float
    flops_limit_s: float
    kind: str
    share: float
    sentence: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Verdict:
    """The verdict on one file: that of its ``headline`` row, and what would help it."""

    headline: RowVerdict
    rows: tuple[RowVerdict, ...]
    evidence: tuple[str, ...]
    advice: tuple[Advice, ...]

    @property
    def kind(self) -> str:
        """ "memory", "compute" or "overhead"."""
        return self.headline.kind

    @property
    def share(self) -> float:
        """The headline's."""
        return self.headline.share

    @property
    def sentence(self) -> str:
        """The headline's."""
        return self.headline.sentence

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": self.kind, "share": self.share, "sentence": self.sentence} | asdict(self)


def verdict(
    rows: Sequence[Row],
    cost: ModelCost,
    limits: Limits,
    *,
    others: Sequence[Row] = (),
    n_operators: int | None = None,
    host_ms: float | None = None,
) -> Verdict:
    """What bounds the rows of one file, and what would help, as far as it was measured.

    ``others`` are rows of other files of the same model, for advice on bits. ``n_operators`` is how
    many operators a decoded token takes (a ``Profile`` tells), ``host_ms`` the time of a token in a
    whole session (sampling, text, Python) beyond the engine's.
    The headline is the fastest decode row of one sequence, else the fastest row.
    Raises UsageError without rows, or when ``limits`` lack a row's thread count.
    """
    if not rows:
        raise UsageError("there is no row to judge")
    judged = [_judge(row, rows, cost, limits, n_operators) for row in rows]
    decode = [each for each in judged if each.phase == "decode" and each.n_seqs == 1]
    headline = max(decode or judged, key=lambda each: each.tok_s)
    chosen = rows[judged.index(headline)]
    return Verdict(
        headline=headline,
        rows=tuple(judged),
        evidence=tuple(_evidence(chosen, headline, cost, limits, host_ms)),
        advice=tuple(advise.advice(chosen, rows, others)),
    )


@dataclass(frozen=True)
class _Work:
    """What one token of a row asks for, and the seconds that each limit allows for it."""

    bytes: float
    flops: float
    memory_s: float
    compute_s: float

    @property
    def roof_s(self) -> float:
        """No token can be faster than the higher of both roofs."""
        return max(self.memory_s, self.compute_s)


def _work(row: Row, cost: ModelCost, limits: Limits) -> _Work:
    roof = limits.at(row.n_threads)
    if decodes(row):
        depth = row.n_depth + row.n_gen / 2
        read = cost.weight_bytes(row.n_seqs) / row.n_seqs + cost.kv_bytes(depth, row.kv_type)
        products = cost.flops_by_type()
    else:
        depth = row.n_depth + row.n_prompt / 2
        batch = min(row.n_batch, row.n_prompt)
        batches = math.ceil(row.n_prompt / batch)
        read = batches * cost.weight_bytes(batch) / row.n_prompt
        read += cost.kv_bytes(depth, row.kv_type) / batch
        products = cost.flops_by_type(output=False)  # the last token's logits are nothing here
    attention = cost.attention_flops(depth)
    compute_s = attention / roof.flops_s
    for type_name, flops in products.items():
        kernel = limits.kernel(type_name, row.n_threads)
        if kernel is None:
            compute_s += flops / roof.flops_s
        elif _one_column(row):
            compute_s += flops / kernel.decode_flops_s
        else:
            compute_s += flops / max(kernel.prefill_flops_s, kernel.decode_flops_s)
    total = attention + sum(products.values())
    return _Work(read, total, read / roof.read_bytes_s, compute_s)


def _one_column(row: Row) -> bool:
    """Whether every product has one column only: then unpacking weights takes most of it."""
    return decodes(row) and row.n_seqs == 1


def _judge(
    row: Row, rows: Sequence[Row], cost: ModelCost, limits: Limits, n_operators: int | None
) -> RowVerdict:
    work = _work(row, cost, limits)
    token_s = 1 / tok_s(row)
    rest_s = max(0.0, token_s - work.memory_s - work.compute_s)
    kind = "memory" if work.memory_s >= work.compute_s else "compute"
    share = work.roof_s / token_s
    fewer = [r for r in advise.differing(row, rows, "n_threads") if r.n_threads < row.n_threads]
    gain = lifted = None
    if fewer:
        gain = tok_s(row) / tok_s(fewer[-1])
        lifted = _work(fewer[-1], cost, limits).roof_s / work.roof_s
    starved = (
        gain is not None
        and lifted is not None
        and lifted >= _LIFTED
        and gain - 1 < _FAIR_PART * (lifted - 1)
    )
    if starved or rest_s > work.roof_s:
        kind, share = "overhead", max(0.0, 1 - share)
        sentence = _overhead_sentence(row, fewer, gain if starved else None, rest_s / token_s)
    elif share >= 1:
        sentence = f"{kind}-bound, at the limit (raw figure {share:.0%})"
    else:
        sentence = f"{kind}-bound at {share:.0%} of the limit"
    return RowVerdict(
        phase="decode" if decodes(row) else "prefill",
        n_threads=row.n_threads,
        n_prompt=row.n_prompt,
        n_gen=row.n_gen,
        n_depth=row.n_depth,
        n_seqs=row.n_seqs,
        kv_type=row.kv_type,
        tok_s=tok_s(row),
        token_ms=token_s * 1e3,
        memory_ms=work.memory_s * 1e3,
        compute_ms=work.compute_s * 1e3,
        read_bytes_s=work.bytes / token_s,
        read_limit_bytes_s=limits.at(row.n_threads).read_bytes_s,
        flops_s=work.flops / token_s,
        flops_limit_s=work.flops / work.compute_s,
        kind=kind,
        share=share,
        sentence=sentence,
        parts=tuple(_parts(row, work, token_s, cost, limits, n_operators)),
    )


def _overhead_sentence(row: Row, fewer: Sequence[Row], gain: float | None, rest: float) -> str:
    """``gain`` is what more threads brought where that was too little, else None."""
    if gain is None:
        return f"overhead-bound: memory and arithmetic explain only {1 - rest:.0%} of the time"
    second = row.n_threads == 2
    who = (
        "a second thread" if second else f"{row.n_threads} threads instead of {fewer[-1].n_threads}"
    )
    adds, makes = ("adds", "makes") if second else ("add", "make")
    if gain * NOTHING < 1:
        return f"overhead-bound: {who} {makes} it {1 - gain:.0%} slower"
    amount = "nothing" if gain < NOTHING else f"only {gain - 1:.0%}"
    return f"overhead-bound: {who} {adds} {amount}"


def _parts(
    row: Row,
    work: _Work,
    token_s: float,
    cost: ModelCost,
    limits: Limits,
    n_operators: int | None,
) -> list[Part]:
    """The time of a token by what was measured, as if nothing overlapped, and what is left."""
    parts = [
        Part("memory", work.memory_s * 1e3, "bytes read at the measured bandwidth"),
        Part("arithmetic", work.compute_s * 1e3, f"FLOP at the rate {_peak(row, cost, limits)}"),
    ]
    operator_s = limits.operator_s(row.n_threads)
    if decodes(row) and operator_s is not None and n_operators is not None:
        parts.append(
            Part(
                "dispatch and barriers",
                n_operators * operator_s / row.n_seqs * 1e3,
                f"{n_operators} operators of {operator_s * 1e6:.2f} us, measured on empty ones",
            )
        )
    left = token_s * 1e3 - sum(part.ms for part in parts)
    parts.append(Part("not explained", max(0.0, left), "what is left"))
    return parts


def _evidence(
    row: Row, judged: RowVerdict, cost: ModelCost, limits: Limits, host_ms: float | None
) -> list[str]:
    threads = f"{row.n_threads} thread{'s' if row.n_threads > 1 else ''}"
    read = judged.read_bytes_s / judged.tok_s
    flops = judged.flops_s / judged.tok_s
    found = [
        f"{judged.phase} with {threads}: {judged.tok_s:.0f} tok/s, {judged.token_ms:.2f} ms each",
        f"reads {read / 1e6:.1f} MB a token: {judged.read_bytes_s / 1e9:.1f} of"
        f" {judged.read_limit_bytes_s / 1e9:.1f} GB/s measured with {threads}"
        f" ({judged.memory_ms / judged.token_ms:.0%})",
        f"computes {flops / 1e6:.0f} MFLOP a token: {judged.flops_s / 1e9:.0f} of"
        f" {judged.flops_limit_s / 1e9:.0f} GFLOP/s {_peak(row, cost, limits)}"
        f" ({judged.compute_ms / judged.token_ms:.0%})",
    ]
    if decodes(row):
        depth = row.n_depth + row.n_gen / 2
        cache = cost.kv_bytes(depth, row.kv_type)
        found.append(
            f"the cache is {cache / read:.0%} of the bytes read, behind {depth:.0f} tokens"
        )
    found += [f"{part.name}: {part.ms:.2f} ms ({part.source})" for part in judged.parts[2:]]
    if host_ms is not None:
        found.append(f"sampling, text and Python add {host_ms:.2f} ms a token to a session")
    if limits.busy:
        found.append("the limits were measured while others used the machine: they may be too low")
    return found


def _peak(row: Row, cost: ModelCost, limits: Limits) -> str:
    """Whose peak the arithmetic was held against."""
    if all(limits.kernel(type_name, row.n_threads) for type_name in cost.types):
        columns = "1 column" if _one_column(row) else "512 columns"
        return f"measured with the engine's {', '.join(cost.types)} products of {columns}"
    return "measured in float32"
