"""`edgekit convert`: parse, call, render."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from edgekit.cli import show
from edgekit.converter import DTYPES, convert
from edgekit.source import source as find_source


@click.command()
@click.argument("model")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Hugging Face folder to write."
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of the weights (default: as stored; f32 for a quantized file).",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(model: str, out: Path, dtype: str | None, as_json: bool) -> None:
    """Turn a GGUF file into a Hugging Face folder.

    MODEL is a GGUF file, an artifact that holds one, or the built-in name smollm2-135m. Quantized
    weights are written as the floats that llama.cpp computes with, so that one real model can feed
    every exporter.

    \b
    edgekit convert smollm2-135m --out build/smollm2-hf
    """
    with show.progress(quiet=as_json) as progress:
        found = find_source(model, on_progress=partial(progress, "download"))
    if found.quantized:
        show.warn(f"{model} is quantized ({found.quantized}): what that lost does not come back")
    with show.progress(quiet=as_json) as progress:
        folder = convert(found, out, dtype=dtype, progress=progress)
    body = {
        "path": str(folder.path),
        "family": folder.family,
        "dtype": folder.config["dtype"],
        "size_bytes": folder.size_bytes,
        "files": list(folder.files),
    }
    if as_json:
        return show.as_json(body)
    show.table(
        [
            ("folder", body["path"]),
            ("family", body["family"]),
            ("weights", body["dtype"]),
            ("size", show.size(folder.size_bytes)),
        ]
    )
