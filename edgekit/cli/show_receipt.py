"""The receipt as a card of a few lines, for every verb that shows one.

Knows how to say figures; never measures or judges them.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgekit.beside import Beside, Figure
from edgekit.cli import show, show_layers
from edgekit.receipt import (
    Agreement,
    Latency,
    Quality,
    Receipt,
    Speed,
    Tuning,
    as_option,
    bounded,
    figure,
)
from edgekit.tensor_figures import Accuracy, Ranking

Row = tuple[str, str]
# What two models may have in common, in words.
LIKENESS = {
    "mean_kl": "mean KL",
    "cosine": "cosine",
    "top1": "same likeliest",
    "neighbours": "same neighbour",
}


def rows(receipt: Receipt, *, earlier: Receipt | None = None) -> list[Row]:
    """(what, figures), for ``show.table``; with ``earlier``, its figures stand behind the new."""
    found = dict(_rows(receipt))
    old = dict(_rows(earlier)) if earlier else {}
    return [
        (what, f"{text}   (manifest: {old[what]})" if old.get(what, text) != text else text)
        for what, text in found.items()
    ]


def warn(receipt: Receipt) -> None:
    """The receipt's warnings, on stderr."""
    for text in receipt.warnings:
        show.warn(text)
    for other in receipt.beside:
        for text in other.notes:
            show.warn(f"{other.form}: {text}")


def _rows(receipt: Receipt) -> Iterator[Row]:
    yield "receipt", _status(receipt)
    if said := receipt.completion:
        yield "generates", f"... {said.text} ..."
    if tokens := receipt.tokens:
        yield "token ids", f"equal on {tokens.texts} texts (judge: {tokens.judge})"
        chats = f"renders the same on {tokens.chats} chats" if tokens.chats else "none"
        yield "chat template", chats
    if receipt.quality:
        yield from _quality(receipt.quality)
    if receipt.speed and receipt.reference:
        yield from _speed(receipt.speed, receipt.reference.type)
    if receipt.agreement:
        yield from agreement(receipt.agreement)
    if receipt.latency:
        yield from _latency(receipt.latency)
    if receipt.text_agreement:
        yield from ((f"texts: {what}", text) for what, text in agreement(receipt.text_agreement))
    if receipt.text_latency:
        yield from ((f"texts: {what}", text) for what, text in _latency(receipt.text_latency))
    if receipt.ranking:
        yield "same ranking", _ranking(receipt.ranking)
    if receipt.accuracy:
        yield "accuracy", _accuracy(receipt.accuracy)
    if receipt.layers:
        yield "loses most", show_layers.first(receipt.layers)
    for trial in receipt.fusion:
        if not trial.kept:
            yield "not fused", f"{trial.name} ({trial.fired}): {trial.ratio:.3g}x the time here"
    if receipt.tuning:
        yield from _tuning(receipt.tuning)
    for number, other in enumerate(receipt.beside, 1):
        which = other.sha256[:8] if other.sha256 else f"file {number}"
        part = f", {other.part}" if other.part else ""
        yield f"as {other.form} ({which}{part})", _beside(other)
    if receipt.gates:
        limits = ", ".join(as_option(name, limit) for name, limit in receipt.gates.items())
        yield "gates passed", limits


def _status(receipt: Receipt) -> str:
    if receipt.reference is None:
        return f"{receipt.status}: {receipt.reason}" if receipt.reason else receipt.status
    text = f"{receipt.status} against {receipt.reference.type} ({receipt.reference.origin})"
    if inherits := receipt.reference.requantized_from:
        text += f"; what {inherits} cost before is not in it"
    return text


def likeness(found: Figure) -> str:
    """The value with its bounds."""
    return bounded(found.value, percent=found.name in ("top1", "neighbours"))


def limit(found: Figure) -> str:
    """What the value must keep."""
    return f"{'at most' if found.name == 'mean_kl' else 'at least'} {figure(found.limit)}"


def _beside(found: Beside) -> str:
    figures = ", ".join(
        f"{LIKENESS[each.name]} {likeness(each)} ({limit(each)})" for each in found.figures
    )
    return f"{figures} on {found.samples} samples ({found.data})"


def agreement(found: Agreement) -> Iterator[Row]:
    """The rows of one agreement."""
    yield (
        "answers",
        f"cosine {bounded(found.cosine)}, at least {figure(found.least_cosine)},"
        f" largest error {found.max_error:.2g}",
    )
    if found.top1:
        top5 = f", in the top 5 {bounded(found.top5, percent=True)}" if found.top5 else ""
        yield "same class", f"{bounded(found.top1, percent=True)}{top5}"
    if found.mean_kl:
        yield "distribution", f"mean KL {bounded(found.mean_kl)}"
    if found.neighbours:
        yield "same neighbour", bounded(found.neighbours, percent=True)
    yield "measured on", f"{found.samples} held-out inputs ({found.data})"


def _tuning(found: Tuning) -> Iterator[Row]:
    where = f" on {found.device}" if found.device else ""
    yield (
        "runtime",
        f"{found.runtime}, the best of {len(found.variants)} variants for {found.goal}{where}",
    )


def _ranking(found: Ranking) -> str:
    return (
        f"likeliest text of an image {bounded(found.top1, percent=True)}, order"
        f" {bounded(found.order)} ({found.images} images, {found.texts} texts)"
    )


def _accuracy(found: Accuracy) -> str:
    return (
        f"{bounded(found.product, percent=True)}, in float"
        f" {bounded(found.reference, percent=True)}: a difference of"
        f" {bounded(found.difference, percent=True)} ({found.samples} inputs of {found.data})"
    )


def _latency(found: Latency) -> Iterator[Row]:
    slower = ", SLOWER" if found.slower else ""
    busy = ", busy machine" if found.busy else ""
    yield (
        "speed here",
        f"{found.ms:.3g} ms, {found.reference_ms:.3g} ms in float: {found.ratio.value:.2f}x the"
        f" speed{slower} ({found.threads} threads{busy})",
    )


def _quality(quality: Quality) -> Iterator[Row]:
    yield (
        "distribution",
        f"mean KL {bounded(quality.mean_kl)}, median {quality.median_kl:.2g},"
        f" p99 {quality.p99_kl:.2g}, p99.9 {quality.p999_kl:.2g}",
    )
    yield "same top-1", bounded(quality.top1, percent=True)
    yield (
        "perplexity",
        f"{quality.perplexity:.4g} for {quality.reference_perplexity:.4g}:"
        f" ratio {bounded(quality.perplexity_ratio)}",
    )
    yield "measured on", f"{quality.chunks} chunks of {quality.n_ctx} tokens of held-out text"


def _speed(speed: Speed, reference: str) -> Iterator[Row]:
    ratios = {"decode": speed.decode_ratio.value, "prefill": speed.prefill_ratio.value}
    first, *others = (
        f"{name} {ratio:.2f}x" + (" (SLOWER)" if name in speed.slower else "")
        for name, ratio in ratios.items()
    )
    figures = ", ".join([f"{first} the speed of {reference}", *others])
    yield (
        "speed here",
        f"{figures} ({speed.decode_tok_s:.0f} and {speed.prefill_tok_s:.0f} tok/s,"
        f" {speed.threads} threads" + (", busy machine)" if speed.busy else ")"),
    )
    path = "the best of this CPU" if speed.fast_path else "NOT the best of this CPU"
    yield "engine", f"{speed.backend or 'fixed'} backend, {path}"
