"""4-bit matrices fitted to what a model does on a text, layer after layer.

Knows the order of the layers and what each token counts; never a recipe or a file format, nor how
one matrix is rounded (``lm_rounding``).

A layer sees what the layers before it, already rounded, make of the text. (To ask it for what the
float model makes of the text, as in https://arxiv.org/abs/2504.02692, made SmolLM2 far worse: a
mean KL of 1.5 for 0.09.) Tokens do not count alike:

- Every later token looks at the first one (attention sinks, https://arxiv.org/abs/2309.17453), so
  an error in its query, key and value reaches them all: there it counts as often as they are many.
- The first token's stream is hundreds of times as large as the others' (massive activations,
  https://arxiv.org/abs/2402.17762), and the next norm divides by that: what a matrix adds to a
  stream counts by the size that the stream has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgekit.errors import ExportError
from edgekit.exporters import lm_blocks, lm_graph, lm_rounding
from edgekit.exporters.lm_blocks import Array
from edgekit.exporters.lm_equalized import Equalized
from edgekit.exporters.lm_graph import Blocks, Plain
from edgekit.exporters.lm_weights import EMBEDDING, MATRICES, Weights

_WRITERS = ("output", "down")  # what they make is added to the stream
_LAYER_FILE = "layer.onnx"
_CPU = "CPUExecutionProvider"

Convert = Callable[[Array, str], Plain | Blocks]  # (matrix, name), for what is not fitted


@dataclass(frozen=True)
class Loss:
    """What rounding a matrix costs: the error of its outputs on the text, as a share of them."""

    name: str
    share: float


@dataclass(frozen=True)
class Fitted:
    """Every matrix of the layers and the table, the norms and biases that go with them, and what
    was lost.
    """

    matrices: dict[str, Plain | Blocks]
    vectors: Equalized
    losses: list[Loss]


def quantize(
    weights: Weights,
    fitted: Mapping[str, int],
    convert: Convert,
    chunks: Sequence[Sequence[int]],
    folder: Path,
    on_layer: Callable[[int, int], None],
) -> Fitted:
    """Round the matrices in ``fitted`` (name -> inputs of a block) to the text, and others by
    ``convert``.

    ``chunks`` are token ids of texts, each seen on its own. ``folder`` is for a scratch file;
    ``on_layer`` hears (done, total). Raises ExportError for activations that are no numbers.
    """
    decoder = weights.decoder
    table = convert(weights.matrix(EMBEDDING), EMBEDDING)
    found: dict[str, Plain | Blocks] = {EMBEDDING: table}
    losses: list[Loss] = []
    equal = Equalized(weights)
    scale = np.float32(decoder.embedding_scale)
    rows = _values(table)
    streams = [rows[list(chunk)] * scale for chunk in chunks]
    for layer in range(decoder.layers):
        seen = _watched(weights, layer, folder, streams)
        sizes = {part: fitted.get(f"{layer}.{part}", 0) for part in MATRICES}
        wanted = [part for part in MATRICES if sizes[part]]
        divided = equal.scale(layer, {part: np.diag(seen[part]) for part in wanted}, sizes)
        new: dict[str, Array] = {}
        for part in MATRICES:
            name = f"{layer}.{part}"
            values = equal.matrix(name)
            if part in wanted:
                over = divided.get(part, np.ones(values.shape[1], np.float32))
                square = seen.pop(part) / np.outer(over, over)
                made, share = lm_rounding.fit(values, square, sizes[part])
                losses.append(Loss(name, share))
                found[name] = made
            else:
                found[name] = convert(values, name)
            new[part] = _values(found[name])
        session = _layer(equal, layer, new, folder)
        streams = [_run(session, ["after"], states)[0] for states in streams]
        on_layer(layer + 1, decoder.layers)
    return Fitted(found, equal, losses)


def _values(matrix: Plain | Blocks) -> Array:
    if isinstance(matrix, Blocks):
        return lm_blocks.restored(matrix)
    return matrix.values.astype(np.float32)


# What a layer's matrices read


def _watched(weights: Weights, layer: int, folder: Path, streams: list[Array]) -> dict[str, Array]:
    """For each matrix X'X, float32 [inputs, inputs], where X is what it reads, row by row as much
    as the token counts.
    """
    floats = {part: weights.matrix(f"{layer}.{part}") for part in MATRICES}
    session = _layer(weights, layer, floats, folder)
    sums: dict[str, Array] = {}
    for stream in streams:
        after, *reads = _run(session, ["after", *MATRICES], stream)
        for part, read in zip(MATRICES, reads, strict=True):
            read *= _worth(part, after)
            square = read.T @ read
            sums[part] = sums[part] + square if part in sums else square
    for part, square in sums.items():
        if not np.isfinite(square).all():
            raise ExportError(f"the model's activations at {layer}.{part} are not finite")
    return sums


def _worth(part: str, after: Array) -> Array:
    """The square root of what each token counts, [tokens, 1]."""
    found = np.ones((len(after), 1), np.float32)
    if part == "qkv":
        found[0] = np.sqrt(len(after))
    elif part in _WRITERS:
        found /= np.maximum(np.sqrt((after * after).mean(axis=1, keepdims=True)), 1e-6)
    return found


def _layer(
    vectors: Weights | Equalized, layer: int, matrices: dict[str, Array], folder: Path
) -> Any:
    """One layer, in float32, ready to run."""
    path = folder / _LAYER_FILE
    lm_graph.write_layer(
        vectors.decoder,
        vectors,
        lambda name: Plain(matrices[name.partition(".")[2]]),
        layer,
        path,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=[_CPU], enable_fallback=0)
    path.unlink()
    return session


def _run(session: Any, names: list[str], states: Array) -> list[Array]:
    """Outputs, [tokens, values] each, for the stream of one text, [tokens, width]."""
    count = len(states)
    feeds = {
        "input": states[None],
        "seqlens_k": np.array([count - 1], np.int32),
        "total_sequence_length": np.array(count, np.int32),
    }
    try:
        return [each[0] for each in session.run(names, feeds)]
    except Exception as error:  # the engine's own kinds, which have no common base
        text = " ".join(str(error).split())
        raise ExportError(f"ONNX Runtime failed on a layer: {text[:200]}") from None
