"""How much models lose when they are quantized: at which bits, in which tensors, which one more.

Knows the order of the work; how one model is measured, ``sensitivity_subject`` knows, and what the
figures say, ``sensitivity_report``.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from edgekit import _fs, quant
from edgekit.errors import UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.exporters import imatrix
from edgekit.sensitivity_report import BitsRow, ModelRows, Report, answers
from edgekit.sensitivity_subject import Subject, digest, interval
from edgekit.source import ModelSource, source

DEFAULT_BITS = (8, 6, 5, 4, 3, 2)
DEFAULT_TEXT_BYTES = 32 << 10
DEFAULT_PART_BYTES = 12 << 10
DEFAULT_LAYERS = 8


def sensitivity(
    models: Sequence[str | Path | ModelSource],
    text: str,
    *,
    bits: Sequence[int] = DEFAULT_BITS,
    calibration: str | Path = imatrix.BUILTIN,
    chunks: int | None = None,
    text_bytes: int = DEFAULT_TEXT_BYTES,
    part_bytes: int = DEFAULT_PART_BYTES,
    layers: int = DEFAULT_LAYERS,
    n_ctx: int = 512,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Quantize every model to the same ``bits``, and say what each loses over the same text.

    Each model is compared with its own floats, over the first ``text_bytes`` of ``text``, at the
    presets of ``edgekit.quant`` and with the importance matrix that an export would use
    (``calibration`` and its ``chunks``). Tensors of one kind, and up to ``layers`` layers spread
    over the model, are then quantized alone, to the fewest ``bits``, and compared over
    ``part_bytes``; ``layers`` 0 leaves both out. Figures are kept in the cache, so that an
    interrupted run goes on where it was. On disk there are never more than one float file and one
    quantized one.

    Raises UsageError for no model, no width, a model named twice or a text that is too short, and
    what ``source``, ``export`` and ``evaluate.compare`` raise.
    """
    if not models or not bits:
        raise UsageError("sensitivity needs a model and a number of bits")
    presets = {count: quant.gguf_preset(count) for count in sorted(set(bits), reverse=True)}
    download = partial(progress, "download")
    sources = [
        each if isinstance(each, ModelSource) else source(each, on_progress=download)
        for each in models
    ]
    used, part = _first_bytes(text, text_bytes), _first_bytes(text, min(part_bytes, text_bytes))
    kind, calibration_text = imatrix.calibration(calibration, chunks)
    rows = []
    with _scratch() as folder:
        for name, found in zip(_names(sources), sources, strict=True):
            subject = Subject(
                name, found, folder, (kind, calibration_text), n_ctx, threads, progress
            )
            rows.append(_measure(subject, presets, used, part, layers))
            subject.tidy()
    return Report(
        models=tuple(rows),
        answers=tuple(answers(rows)),
        n_ctx=n_ctx,
        text_bytes=len(used.encode()),
        text_sha256=digest(used),
        part_bytes=len(part.encode()),
        part_bits=min(presets),
    )


def _measure(
    subject: Subject, presets: dict[int, quant.GgufPreset], text: str, part: str, layers: int
) -> ModelRows:
    """All figures of one model."""
    bytes_per_token = len(text.encode()) / subject.count_tokens(text)
    rows = []
    for at, (count, preset) in enumerate(presets.items()):
        found = subject.loss(
            preset.type, (), preset.imatrix, text, partial(subject.tell, "bits", at, len(presets))
        )
        rows.append(_bits_row(count, preset.type, found, bytes_per_token))
    lowest = presets[min(presets)]
    layers = 0 if lowest.type in quant.FLOAT_TYPES else layers  # floats lose nothing worth a search
    kinds, blocks = subject.parts(lowest, part, layers) if layers else ((), ())
    reference_perplexity = found["reference_perplexity"]
    return ModelRows(
        name=subject.name,
        family=subject.source.family,
        quantized=subject.source.quantized,
        bytes_per_token=bytes_per_token,
        reference_perplexity=reference_perplexity,
        reference_bits_per_byte=math.log2(reference_perplexity) / bytes_per_token,
        bits=tuple(rows),
        kinds=kinds,
        layers=blocks,
        inputs=tuple(subject.inputs(part)) if layers else (),
    )


def _bits_row(bits: int, kind: str, found: dict[str, Any], bytes_per_token: float) -> BitsRow:
    return BitsRow(
        bits=bits,
        type=kind,
        bits_per_weight=found["bits_per_weight"],
        size_bytes=found["size_bytes"],
        tokens=found["tokens"],
        mean_kl=interval(found["mean_kl"]),
        top1=interval(found["top1"]),
        perplexity_ratio=interval(found["perplexity_ratio"]),
        bytes_per_token=bytes_per_token,
    )


def _names(sources: Sequence[ModelSource]) -> list[str]:
    """Short names, as long as they are different."""
    short = [Path(each.spec).name.removesuffix(".gguf") for each in sources]
    if len(set(short)) == len(short):
        return short
    full = [each.spec for each in sources]
    if len(set(full)) < len(full):
        raise UsageError("the same model is named twice")
    return full


def _first_bytes(text: str, count: int) -> str:
    """At most ``count`` bytes of UTF-8, without half a character at the end."""
    return text.encode()[:count].decode("utf-8", "ignore")


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for large files, beside the cache; what killed runs left there goes first."""
    root = _fs.home("cache") / "sensitivity-scratch"
    folder = root / str(os.getpid())
    with _fs.disk_errors(root):
        folder.mkdir(parents=True, exist_ok=True)
    for left in root.iterdir():
        if left.name.isdigit() and not Path(f"/proc/{left.name}").exists():
            shutil.rmtree(left, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
