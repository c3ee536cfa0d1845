"""Convert: a GGUF file to a Hugging Face folder; any model to a float file that is fair to all.

Knows what may be asked for; never a tensor or a tokenizer, those are the exporters'.
"""

from __future__ import annotations

from pathlib import Path

from edgekit.errors import UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.registry import load
from edgekit.source import ModelSource, source

DTYPES = ("f32", "f16", "bf16")


def convert(
    model: str | Path | ModelSource,
    out: str | Path,
    *,
    dtype: str | None = None,
    progress: Progress = no_progress,
) -> ModelSource:
    """Write ``model`` (a GGUF source) as the Hugging Face folder ``out`` and return that folder.

    ``dtype`` is one of ``DTYPES``; by default what the file holds, or "f32" when it is quantized:
    then the weights are exactly those that llama.cpp computes with. Tensors that change on the way
    are held whole, in float32 and a few times over; all others go through in blocks.

    Raises UsageError when ``out`` is somebody else's folder, UnsupportedModelError for a family,
    tensor, type or tokenizer without a Hugging Face form, ExportError for values that do not fit
    ``dtype``, OutOfSpaceError before the work starts, MissingExtraError without the extra "export".
    """
    found = model if isinstance(model, ModelSource) else source(model)
    if found.kind != "gguf":
        raise UsageError(
            f"{found.spec} is a Hugging Face folder already", hint="give a .gguf file to convert"
        )
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype '{dtype}'", hint=f"known: {', '.join(DTYPES)}")
    write = load("edgekit.exporters.to_hf:write", extra="export")
    write(found, Path(out).absolute(), dtype and dtype.upper(), progress=progress)
    return source(out)


def off_grid(
    model: str | Path | ModelSource,
    out: str | Path,
    *,
    seed: int = 1,
    progress: Progress = no_progress,
) -> ModelSource:
    """Write ``model`` as the F32 GGUF ``out``, with other weights and the same function.

    For measuring quantizers: weights that were quantized once lie on that type's grid, which makes
    it look better than it is. Random scales between matrices, drawn from ``seed``, move every
    linear weight but the embedding's.

    Raises UsageError when ``out`` exists or does not end in .gguf, UnsupportedModelError for a
    family that has no such scales, ParityError when a logit moves by more than rounding can,
    OutOfSpaceError, MissingExtraError without the extra "export".
    """
    found = model if isinstance(model, ModelSource) else source(model)
    write = load("edgekit.exporters.fair_reference:write", extra="export")
    write(found, Path(out), seed=seed, progress=progress)
    return source(out)
