"""How a plan and its validation look on a terminal.

Knows plans; never how they are made.
"""

from __future__ import annotations

import click

from edgekit.cli import show
from edgekit.plan import Plan
from edgekit.plan_validate import Validation
from edgekit.predictor import Band


def plan(found: Plan) -> None:
    """The answer first, then what it is made of."""
    memory = found.memory
    fits = (
        f"yes, {show.size(memory.margin)} to spare"
        if found.fits
        else f"NO, {show.size(-memory.margin)} too much"
    )
    rows = [
        ("model", f"{found.model}, {found.parameters / 1e6:,.0f} M weights, {found.type}"),
        ("device", f"{found.title}, {found.threads} threads"),
        ("fits", fits),
    ]
    if found.latency_ms:
        rows.append(("latency", f"{_band(found.latency_ms)} ms"))
    if found.decode and found.prefill and found.decode_full:
        rows += [
            ("decode", f"{_band(found.decode)} tok/s"),
            (f"behind {found.context} tokens", f"{_band(found.decode_full)} tok/s"),
            ("prefill", f"{_band(found.prefill)} tok/s"),
        ]
    rows += [("load, cold", f"{_band(found.load_s)} s"), ("verdict", found.verdict)]
    if found.gpu_layers is not None:
        rows.append(("layers on the GPU", str(found.gpu_layers)))
    rows.append(("recommended", _recommended(found)))
    rows += [("to mind", remark) for remark in found.remarks]
    show.table(rows)
    click.echo()
    show.table(_memory_rows(found), head=("memory", "bytes", ""))
    click.echo()
    show.table(
        [
            (each.name, f"{each.value:,.5g} {each.unit}".rstrip(), each.source, each.origin)
            for each in found.inputs
        ],
        head=("made of", "value", "source", "from"),
    )


def _band(speed: Band) -> str:
    return f"{speed.mid:.3g} ({speed.low:.3g} to {speed.high:.3g})"


def _recommended(found: Plan) -> str:
    best = found.recommended
    if best.type is None:
        return "nothing fits: a smaller model, or a larger board"
    parts = [best.type]
    if best.context:
        parts.append(f"context {best.context}")
    parts.append(f"{best.threads} threads")
    if best.gpu_layers is not None:
        parts.append(f"{best.gpu_layers} layers on the GPU")
    if best.decode_tok_s:
        parts.append(f"{best.decode_tok_s:.3g} tok/s")
    return ", ".join(parts)


def _memory_rows(found: Plan) -> list[tuple[str, str, str]]:
    memory = found.memory
    types = ", ".join(f"{show.size(n)} {kind}" for kind, n in memory.weights_by_type.items())
    cache = f"{found.context} tokens, {found.kv_type}" if found.context else ""
    if found.n_seqs > 1:
        cache = f"{found.n_seqs} x {cache}"
    rows = [
        ("weights", show.size(memory.weights), types),
        ("KV cache", show.size(memory.kv_cache), cache),
        ("compute buffers", show.size(memory.compute), ""),
        ("runtime", show.size(memory.runtime), "Python and the engine"),
        ("total", show.size(memory.total), ""),
        ("available", show.size(memory.available), "the board's, less what its system keeps"),
    ]
    if memory.gpu:
        rows.insert(5, ("of it on the GPU", show.size(memory.gpu), ""))
    return rows


def validation(found: Validation) -> None:
    """Every row, and the errors' median and maximum."""
    show.table(
        [
            (
                row.device,
                row.what,
                f"{row.published:.4g}",
                f"{row.predicted:.4g}",
                row.unit,
                f"{row.error:+.0%}",
                f"{row.blind_error:+.0%}",
                row.source,
            )
            for row in found.rows
        ],
        head=("device", "what", "published", "predicted", "", "error", "unseen", "source"),
    )
    click.echo()
    for words, blind in (("error", False), ("with constants that never saw the board", True)):
        errors = found.summary(blind=blind)
        click.echo(f"{words}: median {errors['median']:.1%}, maximum {errors['max']:.1%}")
    for words in found.impossible:
        click.echo(words)
