"""Where two formats of one language model part: what every matrix of both makes of the same input.

Knows which value of an ONNX file is which of a GGUF, and when a matrix stands out; never how an
engine works. Every layer of the GGUF reads the residual stream of the ONNX file, so that each
loses only what it loses itself.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import _proc, typed_json
from edgekit.errors import UsageError
from edgekit.exporter import Progress
from edgekit.scorer import ModelFiles, memory_limit
from edgekit.tensor_figures import LayerLoss, LayerLosses

_SILENCE_S = 1800
_TOKENS, _MOST_TEXTS = 96, 4
_EQUAL_DB = 150.0  # beyond what float32 can tell
_BREAK_DB = 10.0  # below what the same matrix of other layers keeps
_NOISY_DB = 8.0  # no rounding to 4 bits leaves less; three loses about that
# Matrices whose outputs carry a scale for each channel where columns were equalized
# (exporters/lm_equalized.py), which the matrix behind them takes back.
_SCALED = ("attn_v", "ffn_up")


def departs(
    gguf: ModelFiles, onnx: ModelFiles, text: str, *, threads: int | None, progress: Progress
) -> LayerLosses:
    """Compare the outputs of every matrix on the beginning of ``text``.

    ``drop_db`` is how far one is below the median of the same matrix in all layers; ``first`` is
    the first of the graph that is 10 dB or more below it, or keeps less than 8 dB at all. Computed
    in a child process. Raises UsageError for models that edgekit cannot pair, and what loading
    raises.
    """
    told = _proc.call(
        "edgekit.language_layers:_departs",
        {"gguf": gguf.path, "onnx": onnx.path, "text": text, "threads": threads},
        silence_s=_SILENCE_S,
        memory_bytes=memory_limit([gguf, onnx, onnx], 8 * _TOKENS),
        what="looking into both models",
        on_report=lambda message: progress("compare layers", *message),
    )
    return typed_json.read(LayerLosses, told, "the comparison")


@dataclass(frozen=True)
class _Point:
    """A value that both have: ``part`` is what other layers have too, ``ours`` the GGUF's name."""

    layer: int
    part: str
    ours: str
    theirs: str


def _departs(gguf: str, onnx: str, text: str, threads: int | None) -> Any:
    """Child side of ``departs``."""
    from edgekit.runtimes import llama_inside, ort_lm_inside

    theirs = ort_lm_inside.Inside(Path(onnx))
    ours = llama_inside.Inside(Path(gguf), n_ctx=_TOKENS, threads=threads)
    split = theirs.tokenize(text, special=False)
    if ours.engine.tokenize(text, special=False) != split:
        raise UsageError("the two models split a text into different tokens")
    texts = _texts(split, theirs.facts.bos if theirs.facts.adds_bos else None)
    sums: dict[_Point, tuple[float, float]] = {}
    for number, tokens in enumerate(texts):
        _proc.report([number, len(texts)])
        truth = theirs.values(tokens)
        found = ours.values(tokens, _streams(truth))
        for point, own, wanted in _pairs(found, truth):
            power, error = sums.get(point, (0.0, 0.0))
            more = _compared(own, wanted, fitted=point.part in _SCALED)
            sums[point] = power + more[0], error + more[1]
    _proc.report([len(texts), len(texts)])
    return typed_json.write(_judged({p: _snr_db(*both) for p, both in sums.items()}, len(texts)))


def _texts(tokens: Sequence[int], bos: int | None) -> list[list[int]]:
    """Pieces of a text, each beginning as a text does."""
    parts = [list(tokens[at : at + _TOKENS]) for at in range(0, len(tokens), _TOKENS)]
    parts = [part for part in parts[:_MOST_TEXTS] if len(part) == _TOKENS]
    if not parts:
        raise UsageError(f"the text has {len(tokens)} tokens, not even {_TOKENS}")
    return parts if bos is None else [[bos, *part[1:]] for part in parts]


def _streams(truth: Mapping[str, Any]) -> dict[str, Any]:
    """The residual stream of the ONNX file by the GGUF's names."""
    found: dict[str, Any] = {}
    for name, value in truth.items():
        layer, _, part = name.partition(".")
        if part == "mlp_norm.stream":
            found |= {f"ffn_inp-{layer}": value, f"sa_out-{layer}": value}
        elif part == "norm.stream":
            found[f"l_out-{int(layer) - 1}"] = value
    if "embedded" in truth:
        found["embedded"] = truth["embedded"]
    return found


def _pairs(ours: Mapping[str, Any], truth: Mapping[str, Any]) -> Iterator[tuple[_Point, Any, Any]]:
    """Every matrix of the GGUF with what the ONNX file has for it, in the order of the graph.

    The ONNX file keeps queries, keys and values in one product, gate and up in another.
    """
    import numpy as np

    layers = 1 + max(int(name.split(".")[0]) for name in truth if re.match(r"\d+\.qkv", name))
    if "embedded" in ours and "embedded" in truth:
        point = _Point(-1, "token_embd", "token_embd.weight", "embedded")
        yield point, ours["embedded"], truth["embedded"]
    for layer in range(layers):
        for product, kinds in (
            ("qkv", ("attn_qkv",)),
            ("qkv", ("attn_q", "attn_k", "attn_v")),
            ("attention", ("attn_output",)),
            ("gate_up", ("ffn_gate", "ffn_up")),
            ("gate_up", ("ffn_up",)),
            ("fed", ("ffn_down",)),
        ):
            names = [f"blk.{layer}.{kind}.weight" for kind in kinds]
            value = truth.get(f"{layer}.{product}")
            if value is None or not all(name in ours for name in names):
                continue
            widths = [ours[name].shape[1] for name in names]
            if sum(widths) != value.shape[1]:
                continue  # "ffn_up" alone is not all of a product of gate and up
            parts = np.split(value, np.cumsum(widths)[:-1], axis=1)
            for kind, name, part in zip(kinds, names, parts, strict=True):
                yield _Point(layer, kind, name, f"{layer}.{product}"), ours[name], part
    head = next((n for n in ("output.weight", "token_embd.weight") if _is_head(ours, n, truth)), "")
    if head:
        yield _Point(layers, "output", head, "logits"), ours[head], truth["logits"]


def _is_head(ours: Mapping[str, Any], name: str, truth: Mapping[str, Any]) -> bool:
    return name in ours and "logits" in truth and ours[name].shape == truth["logits"].shape


def _compared(own: Any, wanted: Any, *, fitted: bool) -> tuple[float, float]:
    """Power of what is wanted, and of the error. The first token is left out: its values are
    unlike all others, and large (https://arxiv.org/abs/2402.17762).
    """
    import numpy as np

    if own.shape != wanted.shape:
        raise UsageError(f"a layer makes {own.shape} in one model, {wanted.shape} in the other")
    own, wanted = (np.asarray(each[1:], np.float64) for each in (own, wanted))
    if fitted:
        powers = np.square(own).sum(axis=0)
        own = own * ((own * wanted).sum(axis=0) / np.where(powers > 0, powers, 1.0))
    return float(np.square(wanted).sum()), float(np.square(own - wanted).sum())


def _snr_db(power: float, error: float) -> float:
    if not math.isfinite(error) or power <= 0:
        return -_EQUAL_DB
    if error <= 0:
        return _EQUAL_DB
    return max(-_EQUAL_DB, min(_EQUAL_DB, 10 * math.log10(power / error)))


def _judged(snr_db: Mapping[_Point, float], samples: int) -> LayerLosses:
    """Each against the same matrix of all layers: roundings cost them about alike."""
    parts: dict[str, list[float]] = {}
    for point, value in snr_db.items():
        parts.setdefault(point.part, []).append(value)
    usual = {part: statistics.median_high(values) for part, values in parts.items()}
    layers = tuple(
        LayerLoss(
            layer=f"layer {point.layer}" if point.part not in ("token_embd", "output") else "ends",
            op=point.part,
            tensor=point.ours,
            snr_db=round(value, 2),
            drop_db=round(max(0.0, usual[point.part] - value), 2),
        )
        for point, value in snr_db.items()
    )
    return LayerLosses(
        samples=samples,
        shared=len(layers),
        whole=len(layers),
        first=next(
            (each for each in layers if each.drop_db >= _BREAK_DB or each.snr_db < _NOISY_DB), None
        ),
        layers=layers,
    )
