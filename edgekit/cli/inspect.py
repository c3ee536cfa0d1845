"""`edgekit inspect`: parse, call, render."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import click

from edgekit import graph_file
from edgekit.artifact import Artifact, is_artifact
from edgekit.cli import inspect_graph, show, show_receipt
from edgekit.errors import SourceError
from edgekit.formats import gguf
from edgekit.receipt import Receipt

_LONG = 60  # characters of a metadata value, or entries of a list, before it is cut short


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(path: Path, tensors: bool, as_json: bool) -> None:
    """Show what an artifact, a GGUF, an ONNX or a TFLite file holds; no weight is read."""
    manifest = None
    if is_artifact(path) or path.name == "manifest.json":
        artifact = Artifact.open(path)
        artifact.verify_sizes()
        manifest, path = artifact.manifest, artifact.model_path
    elif path.is_dir():
        raise SourceError(
            f"{path} is neither an artifact nor a model file",
            hint=f"edgekit export {quote(str(path))} makes an artifact of a model's folder",
        )
    if path.suffix.lower() in graph_file.FORMATS:
        return inspect_graph.show_file(path, manifest, tensors, as_json)
    header = gguf.read(path)
    if as_json:
        return show.as_json(_body(path, header, manifest, tensors))
    rows = [
        ("file", str(path)),
        ("size", show.size(header.file_size)),
        ("architecture", str(header.metadata.get("general.architecture", "none"))),
        ("parameters", f"{header.parameters:,}"),
        ("bits per weight", f"{header.bits_per_weight:.2f}"),
        ("tensors", ", ".join(f"{count} {kind}" for kind, count in header.types().items())),
    ]
    if manifest:
        rows += [
            ("exported from", manifest.source["spec"]),
            ("recipe", manifest.recipe.type),
            *show_receipt.rows(Receipt.from_dict(manifest.receipt)),
        ]
    show.table(rows)
    click.echo()
    show.table([(key, _short(value)) for key, value in header.metadata.items()])
    if tensors:
        click.echo()
        show.table(
            [
                (t.name, " x ".join(map(str, t.shape)), t.type, show.size(t.size_bytes))
                for t in header.tensors
            ],
            head=("tensor", "shape", "type", "size"),
        )


def _body(path: Path, header: gguf.GgufHeader, manifest: Any, tensors: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "path": str(path),
        "size_bytes": header.file_size,
        "architecture": header.metadata.get("general.architecture"),
        "parameters": header.parameters,
        "bits_per_weight": header.bits_per_weight,
        "types": header.types(),
        "metadata": {key: _cut(value) for key, value in header.metadata.items()},
    }
    if manifest:
        body["recipe"] = manifest.recipe.to_dict()
        body["source"] = manifest.source
        body["receipt"] = manifest.receipt
    if tensors:
        body["tensors"] = [
            {"name": t.name, "shape": t.shape, "type": t.type, "size_bytes": t.size_bytes}
            for t in header.tensors
        ]
    return body


def _cut(value: Any) -> Any:
    if isinstance(value, list) and len(value) > _LONG:
        return {"length": len(value), "first": value[:4]}
    return value


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value):,} entries"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _LONG else text[:_LONG] + " ..."
