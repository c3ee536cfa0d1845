"""4-bit matrices fitted to what a model does on a text: GPTQ, layer after layer.

Knows the order of the layers and the arithmetic of error feedback; never a recipe or a file format.

Each matrix is rounded column by column, and the columns that are still to come take up the error as
far as the inputs are correlated (GPTQ, https://arxiv.org/abs/2210.17323, algorithm 1). A layer sees
what the layers before it, already rounded, make of the text. Tokens do not count alike:

- Every later token looks at the first one (attention sinks, https://arxiv.org/abs/2309.17453), so
  an error in its query, key and value reaches them all: there it counts as often as they are many.
- The first token's stream is hundreds of times as large as the others' (massive activations,
  https://arxiv.org/abs/2402.17762), and the next norm divides by that: what a matrix adds to a
  stream counts by the size that the stream has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgekit.errors import ExportError
from edgekit.exporters import lm_blocks, lm_graph
from edgekit.exporters.lm_blocks import BLOCK, Array
from edgekit.exporters.lm_graph import Blocks, Plain
from edgekit.exporters.lm_weights import EMBEDDING, MATRICES, Weights

_BITS = 4
# Added to the diagonal of X'X, for a text is only a sample: of the diagonal itself, which takes the
# step towards rounding by importance alone, and of its mean, which keeps it invertible.
_TRUST, _DAMPING = 0.3, 1e-4
_WRITERS = ("output", "down")  # what they make is added to the stream
_LAYER_FILE = "layer.onnx"
_CPU = "CPUExecutionProvider"

Convert = Callable[[Array, str], Plain | Blocks]  # (matrix, name), for what is not fitted


@dataclass(frozen=True)
class Loss:
    """What rounding a matrix costs: the error of its outputs on the text, as a share of them."""

    name: str
    share: float


def quantize(
    weights: Weights,
    fitted: Sequence[str],
    convert: Convert,
    chunks: Sequence[Sequence[int]],
    folder: Path,
    on_layer: Callable[[int, int], None],
) -> tuple[dict[str, Plain | Blocks], list[Loss]]:
    """Every matrix of the layers and the table: those in ``fitted`` by GPTQ, others by ``convert``.

    ``chunks`` are token ids of texts, each seen on its own. ``folder`` is for a scratch file;
    ``on_layer`` hears (done, total). Raises ExportError for activations that are no numbers.
    """
    decoder = weights.decoder
    table = convert(weights.matrix(EMBEDDING), EMBEDDING)
    found: dict[str, Plain | Blocks] = {EMBEDDING: table}
    losses: list[Loss] = []
    rows = _values(table)
    scale = np.float32(decoder.embedding_scale)
    streams = [rows[list(chunk)] * scale for chunk in chunks]
    for layer in range(decoder.layers):
        floats = {part: weights.matrix(f"{layer}.{part}") for part in MATRICES}
        seen = _watched(weights, layer, floats, folder, streams)
        new: dict[str, Array] = {}
        for part, values in floats.items():
            name = f"{layer}.{part}"
            if name in fitted:
                made: Plain | Blocks
                made, share = fit(values, seen[part])
                losses.append(Loss(name, share))
            else:
                made = convert(values, name)
            found[name] = made
            new[part] = _values(made)
        session = _layer(weights, layer, new, folder)
        streams = [_run(session, ["after"], states)[0] for states in streams]
        on_layer(layer + 1, decoder.layers)
    return found, losses


def _values(matrix: Plain | Blocks) -> Array:
    if isinstance(matrix, Blocks):
        return lm_blocks.restored(matrix)
    return matrix.values.astype(np.float32)


# What a layer's matrices read


def _watched(
    weights: Weights,
    layer: int,
    floats: dict[str, Array],
    folder: Path,
    streams: list[Array],
) -> dict[str, Array]:
    """For each matrix X'X, float32 [inputs, inputs], where X is what it reads, row by row as much
    as the token counts.
    """
    session = _layer(weights, layer, floats, folder)
    sums: dict[str, Array] = {}
    for stream in streams:
        after, *reads = _run(session, ["after", *MATRICES], stream)
        size = np.sqrt((after * after).mean(axis=1, keepdims=True))
        looked_at = np.ones((len(stream), 1), np.float32)
        looked_at[0] = np.sqrt(len(stream))
        for part, read in zip(MATRICES, reads, strict=True):
            if part == "qkv":
                read = read * looked_at
            elif part in _WRITERS:
                read = read / np.maximum(size, 1e-6)
            square = read.T @ read
            sums[part] = sums[part] + square if part in sums else square
    for part, square in sums.items():
        if not np.isfinite(square).all():
            raise ExportError(f"the model's activations at {layer}.{part} are not finite")
    return sums


def _layer(weights: Weights, layer: int, matrices: dict[str, Array], folder: Path) -> Any:
    """One layer, in float32, ready to run."""
    path = folder / _LAYER_FILE
    lm_graph.write_layer(
        weights.decoder,
        weights,
        lambda name: Plain(matrices[name.partition(".")[2]]),
        layer,
        path,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=[_CPU])
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


# One matrix


def fit(weights: Array, square: Array) -> tuple[Blocks, float]:
    """Round ``weights``, float32 [outputs, inputs], given X'X of its inputs.

    Also the error of the outputs that rounding leaves, as a share of their power.
    """
    outputs, inputs = weights.shape
    hessian = square.astype(np.float64)
    unused = np.diag(hessian) == 0
    hessian[unused, unused] = 1
    diagonal = np.diag(hessian)
    hessian[np.diag_indices(inputs)] += _TRUST * diagonal + _DAMPING * diagonal.mean()
    inverse = np.linalg.inv(hessian)
    target = weights.T.copy()
    target[unused] = 0
    power = float(np.einsum("io,io->", square @ target, target))
    # Upper triangular: inverse = U'U.
    upper = np.linalg.cholesky(inverse).T.astype(np.float32)
    padded = -(-inputs // BLOCK) * BLOCK
    importance = np.zeros(padded, np.float32)
    importance[:inputs] = np.diag(upper) ** -2
    q = np.zeros((padded, outputs), np.float32)
    scales = np.empty((padded // BLOCK, outputs), np.float32)
    zeros = np.empty_like(scales)
    top = np.float32((1 << _BITS) - 1)
    lost = 0.0
    for block, start in enumerate(range(0, inputs, BLOCK)):
        end = min(start + BLOCK, inputs)
        part = np.zeros((BLOCK, outputs), np.float32)
        part[: end - start] = target[start:end]
        found = lm_blocks.grid(
            np.ascontiguousarray(part.T), importance[start : start + BLOCK], _BITS
        )
        scale, zero = (each[:, 0] for each in found)
        scales[block], zeros[block] = scale, zero
        errors = np.empty((end - start, outputs), np.float32)
        for row in range(end - start):
            column = start + row
            q[column] = np.clip(np.rint(part[row] / scale) + zero, 0, top)
            errors[row] = (part[row] - (q[column] - zero) * scale) / upper[column, column]
            part[row + 1 : end - start] -= np.outer(upper[column, column + 1 : end], errors[row])
        for row in range(end - start, BLOCK):
            q[start + row] = zero
        target[end:] -= upper[start:end, end:].T @ errors
        lost += float((errors * errors).sum(dtype=np.float64))
    blocks = lm_blocks.pack(
        np.ascontiguousarray(q.T).reshape(outputs, -1, BLOCK), scales.T, zeros.T, _BITS, inputs
    )
    return blocks, lost / max(power, 1e-30)
