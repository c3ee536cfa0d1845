"""The receipt: what an export proved about its output, and the limits a user may set on it.

Knows figures, their JSON form and how they compare; never measures one, and knows no engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from edgekit import typed_json
from edgekit.beside import Beside
from edgekit.errors import GateError, ManifestError, UsageError
from edgekit.intervals import Interval
from edgekit.tensor_figures import Accuracy, LayerLosses, PassTrial, Ranking

PROVEN, UNPROVEN = "proven", "unproven"
_DIGITS = 6  # of every figure in the manifest
_CLEARLY_SLOWER = 0.9  # of the reference's speed: more than a quiet machine's noise

# How far a figure may lie from the one in the manifest when it is measured again on another kind of
# CPU: (share of the figure, and at least so much). Other kernels add up in another order and round
# activations in other blocks. On the same machine the figures are equal.
_TOLERANCES = {
    "mean_kl": (0.05, 0.002),
    "median_kl": (0.05, 0.002),
    "p90_kl": (0.05, 0.003),
    "p99_kl": (0.15, 0.01),
    "p999_kl": (0.3, 0.03),
    "top1": (0.0, 0.01),
    "perplexity": (0.01, 0.0),
    "reference_perplexity": (0.01, 0.0),
    "perplexity_ratio": (0.01, 0.0),
}
# The same for models that are no language models: at least so much, of KL a share besides.
_AGREEMENT_TOLERANCES = {
    "cosine": 0.005,
    "mean_kl": 0.01,
    "top1": 0.05,
    "top5": 0.05,
    "neighbours": 0.05,
}
_KL_SHARE = 0.15
_PARTS = (
    *("reference", "completion", "tokens", "quality", "speed"),
    *("agreement", "latency", "size", "text_agreement", "ranking", "accuracy"),
)


@dataclass(frozen=True)
class Reference:
    """The float model that the output was measured against.

    ``requantized_from`` names the type of a source that was quantized already: its own errors are
    in the reference too, so no figure here shows them.
    """

    type: str
    origin: str
    size_bytes: int
    requantized_from: str | None


@dataclass(frozen=True)
class Completion:
    """What the engine made of a prompt, greedily; every logit was finite."""

    prompt: str
    text: str
    tokens: int


@dataclass(frozen=True)
class Tokens:
    """On how many texts the token ids, and on how many chats the rendered template, were equal.

    ``judge`` says whose ids they were compared with. ``chats`` is 0 without a template.
    """

    judge: str
    texts: int
    chats: int


@dataclass(frozen=True)
class Quality:
    """Next-token distributions against the reference on held-out text (edgekit.evaluate).

    KL divergences are in nats; ``top1`` is the share of positions with the same likeliest token.
    """

    text: str
    text_sha256: str
    chunks: int
    n_ctx: int
    tokens: int
    mean_kl: Interval
    median_kl: float
    p90_kl: float
    p99_kl: float
    p999_kl: float
    max_kl: float
    top1: Interval
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: Interval


@dataclass(frozen=True)
class Speed:
    """Tokens per second here, medians of interleaved rounds, and the ratio to the reference.

    A round reads ``n_prompt`` tokens, then makes ``n_gen`` single steps; a ratio's bounds are the
    slowest and the fastest round. ``backend`` is the engine's CPU backend, None for a fixed build;
    ``fast_path`` whether it is the best that this CPU can run. ``busy``: others kept the machine
    working meanwhile.
    """

    decode_tok_s: float
    prefill_tok_s: float
    reference_decode_tok_s: float
    reference_prefill_tok_s: float
    decode_ratio: Interval
    prefill_ratio: Interval
    rounds: int
    n_prompt: int
    n_gen: int
    threads: int
    cpu: str
    backend: str | None
    fast_path: bool
    busy: bool

    @property
    def slower(self) -> list[str]:
        """Which of decode and prefill were slower than the reference.

        In every round, or by so much at the median that one lucky round proves nothing.
        """
        ratios = {"decode": self.decode_ratio, "prefill": self.prefill_ratio}
        return [
            name
            for name, ratio in ratios.items()
            if ratio.high < 1 or ratio.value < _CLEARLY_SLOWER
        ]


@dataclass(frozen=True)
class Agreement:
    """The first output against the reference's on held-out inputs, for models that are no language
    models.

    Of classifiers: ``mean_kl`` of the softmax in nats, ``top1`` the share of inputs with the same
    class, ``top5`` of those whose class is among the five likeliest. Of embeddings: ``neighbours``,
    the share of inputs whose nearest neighbour among the others is the same.
    """

    data: str
    data_sha256: str
    samples: int
    cosine: Interval
    least_cosine: float
    max_error: float
    mean_kl: Interval | None
    top1: Interval | None
    top5: Interval | None
    neighbours: Interval | None


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run here, medians of interleaved rounds, and how many times as fast as
    the reference; the bounds are those of nine rounds in ten.
    """

    ms: float
    reference_ms: float
    ratio: Interval
    rounds: int
    threads: int
    cpu: str
    busy: bool

    @property
    def slower(self) -> bool:
        """In every round, or by so much at the median that one lucky round proves nothing."""
        return self.ratio.high < 1 or self.ratio.value < _CLEARLY_SLOWER


@dataclass(frozen=True)
class Variant:
    """One way that ``--optimize-for`` tried: a type in a runtime. ``ratio`` is how many times as
    fast as float in the runtime where that is fastest, from turns beside each other; ``slower``
    is at least told. ``same`` is the share of inputs with the same class or nearest neighbour.
    ``why_not`` says what it does not keep, "" for nothing.
    """

    type: str
    runtime: str
    size_bytes: int
    ms: float
    ratio: Interval
    cosine: float
    same: float | None
    why_not: str = ""
    slower: bool = False


@dataclass(frozen=True)
class Tuning:
    """What was tried on a machine, and which ``runtime`` the artifact is loaded in therefore.

    ``goal`` is "latency", "size" or "accuracy"; ``refused`` are variants that an engine does not
    run, with its words. ``device`` is None for the machine that made the export.
    """

    goal: str
    runtime: str
    threads: int
    cpu: str
    variants: tuple[Variant, ...]
    refused: tuple[str, ...] = ()
    device: str | None = None


@dataclass(frozen=True)
class Size:
    """Of the model file. ``fallbacks``: tensors that are larger than their type promises."""

    size_bytes: int
    bits_per_weight: float
    fallbacks: int


@dataclass(frozen=True)
class Receipt:
    """What was proved. ``reason`` says why nothing was; ``gates`` are the limits that it passed.

    Of a model of two encoders ``agreement`` and ``latency`` are those of the images' encoder, with
    "text_" those of the texts'. ``fusion`` is what the passes were worth, ``layers`` what each
    layer loses, if somebody asked; ``beside`` are other files that it was held against.
    """

    status: str = UNPROVEN
    reason: str | None = None
    reference: Reference | None = None
    completion: Completion | None = None
    tokens: Tokens | None = None
    quality: Quality | None = None
    speed: Speed | None = None
    agreement: Agreement | None = None
    latency: Latency | None = None
    size: Size | None = None
    tuning: Tuning | None = None
    text_agreement: Agreement | None = None
    text_latency: Latency | None = None
    ranking: Ranking | None = None
    accuracy: Accuracy | None = None
    layers: LayerLosses | None = None
    fusion: tuple[PassTrial, ...] = ()
    beside: tuple[Beside, ...] = ()
    gates: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without what is empty; figures are rounded to 6 digits."""
        body = _rounded(typed_json.write(self))
        return {name: value for name, value in body.items() if value not in (None, {}, [])}

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Receipt:
        """A receipt out of a manifest, which anybody can write. Raises ManifestError."""
        try:
            return typed_json.read(cls, typed_json.write(cls()) | body, "receipt")
        except typed_json.Mismatch as error:
            raise ManifestError(f"the manifest's {error}") from None


@dataclass(frozen=True)
class Gates:
    """Limits on an export; None means none. A measured figure counts, not its interval.

    ``max_kld`` and ``max_kld_p99`` in nats, ``min_top1`` as a share, ``max_ppl_ratio`` and
    ``min_speed_ratio`` (the slower of decode and prefill, or the latency) against the reference,
    ``min_cosine`` the mean over held-out inputs, ``max_size_bytes`` for all files of the artifact.
    Raises UsageError for a limit that makes no sense.
    """

    max_kld: float | None = None
    max_kld_p99: float | None = None
    min_top1: float | None = None
    min_cosine: float | None = None
    max_ppl_ratio: float | None = None
    max_size_bytes: int | None = None
    min_speed_ratio: float | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if not number or not math.isfinite(limit) or limit <= 0:
                raise UsageError(f"{name} must be a number above 0, not {limit!r}")
        if self.min_top1 is not None and self.min_top1 > 1:
            raise UsageError(f"min_top1 must be a share of at most 1, not {self.min_top1!r}")
        if self.min_cosine is not None and self.min_cosine > 1:
            raise UsageError(f"min_cosine must be at most 1, not {self.min_cosine!r}")

    def limits(self) -> dict[str, float]:
        """Those that are set."""
        return {name: limit for name, limit in vars(self).items() if limit is not None}

    @property
    def need_a_receipt(self) -> bool:
        """Whether any of them is about more than the size."""
        return any(name != "max_size_bytes" for name in self.limits())

    def check(self, receipt: Receipt, size_bytes: int) -> None:
        """Raises GateError, which names every limit that is missed and by how much.

        A limit on something that was not measured is missed.
        """
        figures = _figures(receipt, size_bytes)
        missed = []
        for name, limit in self.limits().items():
            what, figure, shown = figures[name]
            if figure is None:
                missed.append(f"{what} was not measured ({as_option(name, limit)})")
            elif figure > limit if name.startswith("max_") else figure < limit:
                side = "above" if name.startswith("max_") else "below"
                gap, share = abs(figure - limit), abs(figure - limit) / limit
                missed.append(
                    f"{what} {shown} is {_amount(name, gap)} ({share:.1%}) {side}"
                    f" {as_option(name, limit)}"
                )
        if missed:
            raise GateError(
                f"{len(missed)} of {len(self.limits())} gates failed, nothing was kept: "
                + "; ".join(missed),
                hint="choose another --type or --bits, or another limit",
            )


def _figures(receipt: Receipt, size_bytes: int) -> dict[str, tuple[str, float | None, str]]:
    """Gate -> (what it is about, the figure, the figure with its bounds as people read it)."""
    quality, speed = receipt.quality, receipt.speed
    likeness = quality or receipt.agreement
    top1 = receipt.ranking or likeness
    cosines = [each.cosine for each in (receipt.agreement, receipt.text_agreement) if each]
    ratios = [each.ratio for each in (receipt.latency, receipt.text_latency) if each]
    if speed:
        ratios = [speed.decode_ratio, speed.prefill_ratio]
    return {
        "max_kld": ("mean KL", *_bounded(likeness.mean_kl if likeness else None)),
        "max_kld_p99": (
            "p99 of KL",
            quality.p99_kl if quality else None,
            f"{quality.p99_kl:.4g}" if quality else "",
        ),
        "min_top1": ("same top-1", *_bounded(top1.top1 if top1 else None, percent=True)),
        "min_cosine": ("cosine", *_bounded(_least(cosines))),
        "max_ppl_ratio": (
            "perplexity ratio",
            *_bounded(quality.perplexity_ratio if quality else None),
        ),
        "max_size_bytes": ("size", size_bytes, _amount("max_size_bytes", size_bytes)),
        "min_speed_ratio": ("speed ratio", *_bounded(_least(ratios))),
    }


def _least(intervals: list[Interval]) -> Interval | None:
    return min(intervals, key=lambda each: each.value, default=None)


def _bounded(interval: Interval | None, *, percent: bool = False) -> tuple[float | None, str]:
    return (interval.value, bounded(interval, percent=percent)) if interval else (None, "")


def bounded(interval: Interval, *, percent: bool = False) -> str:
    """``0.049 [0.045, 0.053]``, or ``86.9% [86.1, 87.7]``."""
    if percent:
        value, low, high = (100 * x for x in (interval.value, interval.low, interval.high))
        return f"{value:.1f}% [{low:.1f}, {high:.1f}]"
    return f"{figure(interval.value)} [{figure(interval.low)}, {figure(interval.high)}]"


def figure(value: float) -> str:
    """Three digits, and just below 1 as many as tell it from 1: a cosine of .99951 is not 1."""
    digits = 3 if not 0.99 < value < 1 else 1 - math.floor(math.log10(1 - value))
    return f"{value:.{digits}g}"


def as_option(name: str, limit: float) -> str:
    """A gate as the command line has it: ``--max-size 120 MB``."""
    return f"--{name.removesuffix('_bytes').replace('_', '-')} {_amount(name, limit)}"


def _amount(name: str, value: float) -> str:
    return f"{value / 1e6:.4g} MB" if name == "max_size_bytes" else f"{value:.3g}"


def differences(was: Receipt, now: Receipt) -> list[str]:
    """Where a receipt that was measured again leaves the tolerances of the earlier one.

    Speeds are no part of it: they belong to a machine and its mood.
    """
    found = []
    if was.status == PROVEN:
        found += [
            f"it has no {name}"
            for name in _PARTS
            if getattr(was, name) is None and getattr(now, name) is not None
        ]
    if was.size and now.size and was.size.size_bytes != now.size.size_bytes:
        found.append(f"size_bytes was {was.size.size_bytes}, is {now.size.size_bytes}")
    if was.quality and now.quality:
        for name in ("text_sha256", "chunks", "n_ctx", "tokens"):
            old, new = getattr(was.quality, name), getattr(now.quality, name)
            if old != new:
                found.append(f"{name} was {old}, is {new}")
        for name, (share, least) in _TOLERANCES.items():
            old, new = (_value(getattr(side.quality, name)) for side in (was, now))
            if not abs(old - new) <= max(share * abs(new), least):
                found.append(f"{name} was {old:.4g}, is {new:.4g}")
    if was.agreement and now.agreement:
        found += _disagreements(was.agreement, now.agreement)
    if was.text_agreement and now.text_agreement:
        found += [f"text: {e}" for e in _disagreements(was.text_agreement, now.text_agreement)]
    pairs = [(was.ranking, now.ranking, "top1"), (was.accuracy, now.accuracy, "product")]
    for one, other, name in pairs:
        if one and other:
            old, new = _value(getattr(one, name)), _value(getattr(other, name))
            if not abs(old - new) <= _AGREEMENT_TOLERANCES["top1"]:
                found.append(f"{type(one).__name__.lower()} was {old:.4g}, is {new:.4g}")
    return found


def _disagreements(was: Agreement, now: Agreement) -> Iterator[str]:
    for name in ("data_sha256", "samples"):
        if (old := getattr(was, name)) != (new := getattr(now, name)):
            yield f"{name} was {old}, is {new}"
    for name, least in _AGREEMENT_TOLERANCES.items():
        pair = getattr(was, name), getattr(now, name)
        if None in pair:
            if pair != (None, None):
                yield f"{name} was {pair[0]}, is {pair[1]}"
            continue
        old, new = map(_value, pair)
        share = _KL_SHARE if name == "mean_kl" else 0.0
        if not abs(old - new) <= max(share * abs(new), least):
            yield f"{name} was {old:.4g}, is {new:.4g}"


def _value(figure: float | Interval) -> float:
    return figure.value if isinstance(figure, Interval) else figure


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
