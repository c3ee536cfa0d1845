"""How `edgekit eval` shows perplexity and KL divergence. Never measures anything."""

from __future__ import annotations

from edgekit.cli import show
from edgekit.evaluate import Divergence, Perplexity
from edgekit.intervals import Interval


def perplexity(found: Perplexity, facts: dict[str, str], as_json: bool) -> None:
    """One model over a text; ``facts`` say which."""
    if as_json:
        return show.as_json(facts | found.to_dict())
    show.table(
        [
            *facts.items(),
            _read(found),
            ("perplexity", _bounds(found.value, ".4g")),
            ("speed", f"{found.tok_s:.0f} tok/s"),
        ]
    )


def divergence(found: Divergence, facts: dict[str, str], as_json: bool) -> None:
    """A model against its reference; ``facts`` say which."""
    if as_json:
        return show.as_json(facts | found.to_dict())
    top1 = Interval(*(100 * share for share in vars(found.top1).values()))
    show.table(
        [
            *facts.items(),
            _read(found),
            ("perplexity", f"{found.perplexity:.4f}"),
            ("of the reference", f"{found.reference_perplexity:.4f}"),
            ("ratio", _bounds(found.perplexity_ratio, ".4f")),
            ("mean KL", _bounds(found.mean_kl, ".4g")),
            ("median KL", f"{found.median_kl:.4g}"),
            ("90% of tokens below", f"{found.p90_kl:.4g}"),
            ("99% of tokens below", f"{found.p99_kl:.4g}"),
            ("99.9% of tokens below", f"{found.p999_kl:.4g}"),
            ("largest KL", f"{found.max_kl:.4g}"),
            ("same top-1 token", f"{_bounds(top1, '.2f')} %"),
            ("speed", f"{found.tok_s:.0f} tok/s, both models"),
        ]
    )


def _read(found: Perplexity | Divergence) -> tuple[str, str]:
    chunks = f"{found.chunks} chunk{'s' if found.chunks > 1 else ''} of {found.n_ctx} tokens"
    return ("read", f"{chunks}, {found.tokens} tokens scored")


def _bounds(found: Interval, form: str) -> str:
    """``1.0312 (1.0201 .. 1.0425)``: the value and its 95% interval."""
    value, low, high = (format(number, form) for number in vars(found).values())
    return f"{value} ({low} .. {high})"
