"""`edgekit convert`: parse, call, render."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from edgekit.cli import show
from edgekit.converter import DTYPES, convert, off_grid
from edgekit.errors import UsageError
from edgekit.source import ModelSource
from edgekit.source import source as find_source


@click.command()
@click.argument("model")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Hugging Face folder to write; with --off-grid, the GGUF file.",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of the weights (default: as stored; f32 for a quantized file).",
)
@click.option(
    "--off-grid",
    "moved",
    is_flag=True,
    help="Instead: an F32 GGUF of the same function with other weights, to measure quantizers on.",
)
@click.option(
    "--seed", type=click.IntRange(0), help="Of the scales that --off-grid draws (default 1)."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(
    model: str, out: Path, dtype: str | None, moved: bool, seed: int | None, as_json: bool
) -> None:
    """Turn a GGUF file into a Hugging Face folder.

    MODEL is a GGUF file, an artifact that holds one, or the built-in name smollm2-135m. Quantized
    weights are written as the floats that llama.cpp computes with, so that one real model can feed
    every exporter.

    \b
    edgekit convert smollm2-135m --out build/smollm2-hf
    edgekit convert smollm2-135m --out build/fair.gguf --off-grid
    """
    if moved and dtype:
        raise UsageError("--off-grid writes F32: --dtype means nothing for it")
    if seed is not None and not moved:
        raise UsageError("--seed belongs to --off-grid")
    with show.progress(quiet=as_json) as progress:
        found = find_source(model, on_progress=partial(progress, "download"))
    if moved:
        with show.progress(quiet=as_json) as progress:
            made = off_grid(found, out, seed=1 if seed is None else seed, progress=progress)
        return _render(made, "F32", as_json)
    if found.quantized:
        show.warn(f"{model} is quantized ({found.quantized}): what that lost does not come back")
    with show.progress(quiet=as_json) as progress:
        folder = convert(found, out, dtype=dtype, progress=progress)
    _render(folder, folder.config["dtype"], as_json)


def _render(made: ModelSource, dtype: str, as_json: bool) -> None:
    body = {
        "path": str(made.path),
        "family": made.family,
        "dtype": dtype,
        "size_bytes": made.size_bytes,
        "files": list(made.files),
    }
    if as_json:
        return show.as_json(body)
    show.table(
        [
            ("file" if made.kind == "gguf" else "folder", str(made.path)),
            ("family", made.family),
            ("weights", dtype),
            ("size", show.size(made.size_bytes)),
        ]
    )
