"""What `edgekit inspect` prints for an ONNX file: its inputs, outputs, operators and weights.

Knows how to render a header; never how one is read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from edgekit.artifact import Manifest
from edgekit.cli import show, show_receipt
from edgekit.formats import onnx
from edgekit.receipt import Receipt

_MOST = 12  # kinds of operators


def show_file(path: Path, manifest: Manifest | None, tensors: bool, as_json: bool) -> None:
    """The file's header, and the manifest's receipt if there is one."""
    header = onnx.read(path)
    operators = Counter(node.op_type for node in header.nodes)
    types = Counter(tensor.dtype for tensor in header.initializers)
    if as_json:
        body = {
            "path": str(path),
            "size_bytes": header.file_size,
            "opsets": header.opsets,
            "parameters": header.parameters,
            "types": types,
            "operators": operators,
            "inputs": [_value(value) for value in header.inputs],
            "outputs": [_value(value) for value in header.outputs],
        }
        if manifest:
            body |= {"recipe": manifest.recipe.to_dict(), "source": manifest.source}
            body |= {"receipt": manifest.receipt, "details": manifest.details}
        if tensors:
            body["tensors"] = [
                {"name": t.name, "shape": t.shape, "type": t.dtype, "size_bytes": t.size_bytes}
                for t in header.initializers
            ]
        return show.as_json(body)
    rows = [
        ("file", str(path)),
        ("size", show.size(header.file_size)),
        ("operator sets", ", ".join(f"{name or 'onnx'} {n}" for name, n in header.opsets.items())),
        ("parameters", f"{header.parameters:,}"),
        ("tensors", ", ".join(f"{count} {kind}" for kind, count in types.most_common())),
        ("operators", ", ".join(f"{n} {kind}" for kind, n in operators.most_common(_MOST))),
        *(("input", _shown(value)) for value in header.inputs),
        *(("output", _shown(value)) for value in header.outputs),
    ]
    if manifest:
        rows += [
            ("exported from", manifest.source["spec"]),
            ("recipe", manifest.recipe.type),
            *show_receipt.rows(Receipt.from_dict(manifest.receipt)),
        ]
    show.table(rows)
    if tensors:
        show.table(
            [
                (t.name, " x ".join(map(str, t.shape)), t.dtype, show.size(t.size_bytes))
                for t in header.initializers
            ],
            head=("tensor", "shape", "type", "size"),
        )


def _value(value: onnx.OnnxValue) -> dict[str, object]:
    return {"name": value.name, "type": value.dtype, "shape": value.shape}


def _shown(value: onnx.OnnxValue) -> str:
    return f"{value.name}: {value.dtype} [{', '.join(str(dim or '?') for dim in value.shape)}]"
