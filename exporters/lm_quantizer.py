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

# Attention's matrices: where blocks half as large bring most for their bytes. With such blocks in
# every matrix a step takes a third longer (docs/onnx-language-models.md).
_FINER = ("qkv", "output")
_SMALL = 32  # inputs of the smallest block


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
    if not _is_four(kind):
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
        if EMBEDDING in matching and _is_four(wanted):
            raise RecipeError("the table of embeddings takes 8 bits or floats, not 4 bits")
        found |= dict.fromkeys(matching, wanted)
    found[EMBEDDING] = _of_table(found[EMBEDDING], decoder.width)
    return found


def _of_table(kind: str, width: int) -> str:
    """The type of the table of embeddings, whose operator takes whole blocks alone."""
    blocks = quant.blocks(kind)
    if blocks is None or not width % blocks[1]:
        return kind
    return "F16" if width % _SMALL else f"weight_only_wi{blocks[0]}b{_SMALL}"


def _default(decoder: Decoder, kind: str, name: str) -> str:
    """The ends of a model are worth 8 bits: every error there reaches every answer."""
    if _is_four(kind) and name in (EMBEDDING, HEAD):
        return kind.replace("wi4", "wi8")
    if kind == "weight_only_wi4b64" and name.partition(".")[2] in _FINER:
        return "weight_only_wi4b32"
    return kind


def _is_four(kind: str) -> bool:
    blocks = quant.blocks(kind)
    return blocks is not None and blocks[0] == 4


def size_bytes(kind: str, rows: int, columns: int) -> int:
    """Bytes of a matrix, with its scales and zero points."""
    found = quant.blocks(kind)
    if found is None:
        return rows * columns * (2 if kind == "F16" else 4)
    bits, size = found
    blocks = -(-columns // size)
    values = blocks * (size * bits // 8 + 2)
    return rows * (values + (-(-blocks // 2) if bits == 4 else 0))


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
    found = {name: quant.blocks(kinds[name]) for name in layers}
    fitted = lm_calibrated.quantize(
        weights,
        {name: blocks[1] for name, blocks in found.items() if blocks and blocks[0] == 4},
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
    if blocks := quant.blocks(kind):
        return lm_blocks.quantize(values, *blocks)
    if kind == "F16":
        if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
            raise ExportError(
                f"'{name}' holds values beyond the range of F16 (65504)", hint="choose F32"
            )
        return Plain(values.astype(np.float16))
    return Plain(values)
