"""Which type each matrix of a language model gets, and the matrices in these types.

Knows types and names; how blocks are searched (``lm_blocks``) and what calibration adds
(``lm_calibrated``) its neighbours know.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from edgekit import language_model, quant
from edgekit.errors import ExportError, RecipeError
from edgekit.exporter import ExportOptions, Progress
from edgekit.exporters import imatrix, lm_blocks, lm_calibrated
from edgekit.exporters.arch.decoder import Decoder
from edgekit.exporters.lm_graph import Blocks, Matrices, Plain, Vectors
from edgekit.exporters.lm_weights import EMBEDDING, HEAD, Weights, names
from edgekit.recipe import Calibration, Recipe

_FOUR, _EIGHT = "weight_only_wi4b32", "weight_only_wi8b32"
_BITS = {_FOUR: 4, _EIGHT: 8}


@dataclass(frozen=True)
class Made:
    """The matrices by name, the norms and biases that go with them, and what a manifest says of
    how they were made.
    """

    matrices: Matrices
    vectors: Vectors
    details: dict[str, Any] = field(default_factory=dict)


def calibration(kind: str, options: ExportOptions) -> tuple[Calibration | None, bytes]:
    """The text that 4-bit matrices are fitted on, and its bytes. Raises RecipeError."""
    choice = options.calibration
    if kind != _FOUR:
        if choice not in (None, "none") or options.chunks is not None:
            raise RecipeError(f"{kind} looks at no text: a calibration has no use")
        return None, b""
    if choice == "none":
        if options.chunks is not None:
            raise RecipeError("without a calibration there are no chunks to count")
        return None, b""
    return imatrix.calibration(choice or imatrix.BUILTIN, options.chunks)


def types(decoder: Decoder, recipe: Recipe) -> dict[str, str]:
    """Name -> type of every matrix. Raises RecipeError for an override that matches nothing."""
    found = {name: _default(decoder, recipe.type, name) for name in names(decoder)}
    for pattern, kind in reversed(recipe.overrides):
        wanted = quant.onnx_type(kind)
        if wanted not in quant.ONNX_LANGUAGE_TYPES:
            raise RecipeError(f"a matrix of a language model cannot be {wanted}")
        matching = [name for name in found if re.search(pattern, name)]
        if not matching:
            raise RecipeError(
                f"pattern {pattern!r} matches no matrix",
                hint="edgekit export --dry-run lists them",
            )
        if EMBEDDING in matching and wanted == _FOUR:
            raise RecipeError("the table of embeddings takes 8 bits or floats, not 4 bits")
        found |= dict.fromkeys(matching, wanted)
    if decoder.width % lm_blocks.BLOCK and found[EMBEDDING] in _BITS:
        found[EMBEDDING] = "F16"
    return found


def _default(decoder: Decoder, kind: str, name: str) -> str:
    """The ends of a model are worth 8 bits: every error there reaches every answer."""
    return _EIGHT if kind == _FOUR and name in (EMBEDDING, HEAD) else kind


def size_bytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of a matrix, with its scales and zero points."""
    if kind not in _BITS:
        return rows * columns * (2 if kind == "F16" else 4)
    blocks = -(-columns // lm_blocks.BLOCK)
    values = blocks * (lm_blocks.BLOCK * _BITS[kind] // 8 + 2)
    return rows * (values + (-(-blocks // 2) if kind == _FOUR else 0))


def quantize(
    weights: Weights,
    recipe: Recipe,
    text: bytes,
    folder: Path,
    progress: Progress,
) -> Made:
    """Every matrix in the type that the recipe gives it. ``folder`` holds the tokenizer, and takes
    scratch files.
    """
    kinds = types(weights.decoder, recipe)
    counts = {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))}
    if recipe.calibration is None:
        return Made(
            lambda name: convert(weights.matrix(name), kinds[name], name),
            weights,
            {"types": counts},
        )
    chunks = _chunks(text, recipe.calibration, folder)
    layers = [name for name in kinds if name not in (EMBEDDING, HEAD)]
    fitted = lm_calibrated.quantize(
        weights,
        [name for name in layers if kinds[name] == _FOUR],
        lambda values, name: convert(values, kinds[name], name),
        chunks,
        folder,
        lambda done, total: progress("fit to the text", done, total),
    )

    def matrix(name: str) -> Plain | Blocks:
        if name in fitted.matrices:
            return fitted.matrices[name]
        return convert(weights.matrix(name), kinds[name], name)

    worst = max(fitted.losses, key=lambda loss: loss.share, default=None)
    return Made(
        matrix,
        fitted.vectors,
        {
            "types": counts,
            "fitted": {
                "text": recipe.calibration.text,
                "chunks": len(chunks),
                "matrices": len(fitted.losses),
                "worst": worst and {"matrix": worst.name, "lost": float(f"{worst.share:.3g}")},
            },
        },
    )


def _chunks(text: bytes, calibration: Calibration, folder: Path) -> list[list[int]]:
    """Token ids of pieces from all over the text, each as the model would see it."""
    facts = language_model.read(folder / language_model.FILE)
    tokenizer = Tokenizer.from_file(str(folder / language_model.TOKENIZER))
    tokenizer.no_truncation()
    tokens = tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids
    size = min(calibration.chunk_tokens, facts.context_length)
    available = len(tokens) // size
    if available < 2:
        raise ExportError(
            f"the calibration text has {len(tokens)} tokens, not even {2 * size}",
            hint="give a longer --calibration text",
        )
    starts = np.linspace(0, available - 1, min(calibration.chunks, available)).astype(int) * size
    found = [tokens[start : start + size] for start in starts]
    if facts.adds_bos and facts.bos is not None:
        for chunk in found:
            chunk[0] = facts.bos
    return found


def convert(values: lm_blocks.Array, kind: str, name: str) -> Plain | Blocks:
    """A matrix in a type, by rounding alone. Raises ExportError where float16 cannot hold it."""
    if kind in _BITS:
        return lm_blocks.quantize(values, _BITS[kind])
    if kind == "F16":
        if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise ExportError(
                f"'{name}' holds values beyond the range of F16 (65504)", hint="choose F32"
            )
        return Plain(values.astype(np.float16))
    return Plain(values)
