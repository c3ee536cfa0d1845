"""What `edgekit inspect` prints for an ONNX or a TFLite file: its ends, operators and weights.

Knows how to render headers; never how one is read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from edgekit.artifact import Manifest
from edgekit.cli import show, show_receipt
from edgekit.formats import onnx, tflite
from edgekit.receipt import Receipt

_MOST = 12  # kinds of operators

Shape = tuple[int | str | None, ...]


@dataclass(frozen=True)
class _View:
    """What both formats have. ``version`` is what the format calls so: a name, and for JSON and for
    people. Inputs and outputs are (name, dtype, shape), tensors have their bytes besides.
    """

    version: tuple[str, object, str]
    size_bytes: int
    parameters: int
    operators: Counter[str]
    inputs: list[tuple[str, str, Shape]]
    outputs: list[tuple[str, str, Shape]]
    tensors: list[tuple[str, str, Shape, int]]


def show_file(path: Path, manifest: Manifest | None, tensors: bool, as_json: bool) -> None:
    """The file's header, and the manifest's receipt if there is one."""
    view = _of_onnx(onnx.read(path)) if path.suffix.lower() == ".onnx" else _of_tflite(path)
    types = Counter(dtype for _, dtype, _, _ in view.tensors)
    name, value, words = view.version
    if as_json:
        body = {
            "path": str(path),
            "size_bytes": view.size_bytes,
            name: value,
            "parameters": view.parameters,
            "types": types,
            "operators": view.operators,
            "inputs": [_end(*each) for each in view.inputs],
            "outputs": [_end(*each) for each in view.outputs],
        }
        if manifest:
            body |= {"recipe": manifest.recipe.to_dict(), "source": manifest.source}
            body |= {"receipt": manifest.receipt, "details": manifest.details}
        if tensors:
            body["tensors"] = [
                {"name": name, "shape": shape, "type": dtype, "size_bytes": size_bytes}
                for name, dtype, shape, size_bytes in view.tensors
            ]
        return show.as_json(body)
    rows = [
        ("file", str(path)),
        ("size", show.size(view.size_bytes)),
        (name.replace("opsets", "operator sets"), words),
        ("parameters", f"{view.parameters:,}"),
        ("tensors", ", ".join(f"{count} {kind}" for kind, count in types.most_common())),
        ("operators", ", ".join(f"{n} {kind}" for kind, n in view.operators.most_common(_MOST))),
        *(("input", _shown(*each)) for each in view.inputs),
        *(("output", _shown(*each)) for each in view.outputs),
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
                (name, " x ".join(map(str, shape)), dtype, show.size(size_bytes))
                for name, dtype, shape, size_bytes in view.tensors
            ],
            head=("tensor", "shape", "type", "size"),
        )


def _of_onnx(header: onnx.OnnxHeader) -> _View:
    return _View(
        (
            "opsets",
            header.opsets,
            ", ".join(f"{name or 'onnx'} {number}" for name, number in header.opsets.items()),
        ),
        header.file_size,
        header.parameters,
        Counter(node.op_type for node in header.nodes),
        [(value.name, value.dtype, value.shape) for value in header.inputs],
        [(value.name, value.dtype, value.shape) for value in header.outputs],
        [(t.name, t.dtype, t.shape, t.size_bytes) for t in header.initializers],
    )


def _of_tflite(path: Path) -> _View:
    header = tflite.read(path)
    keys = [signature.key for signature in header.signatures]
    tensors = header.main.tensors

    def ends(named: dict[str, int]) -> list[tuple[str, str, Shape]]:
        return [(name, tensors[n].dtype, tensors[n].shape) for name, n in named.items()]

    return _View(
        ("signatures", keys, ", ".join(keys) or "none"),
        header.file_size,
        header.parameters,
        Counter(operator.kind for graph in header.graphs for operator in graph.operators),
        ends(header.inputs),
        ends(header.outputs),
        [(t.name, _kind(t), t.shape, t.size_bytes) for t in header.constants],
    )


def _kind(tensor: tflite.TfliteTensor) -> str:
    """With what its scales are for: ``int8 per channel``."""
    if tensor.block:
        return f"{tensor.dtype} per {tensor.block}"
    return f"{tensor.dtype} per channel" if tensor.scales > 1 else tensor.dtype


def _end(name: str, dtype: str, shape: Shape) -> dict[str, object]:
    return {"name": name, "type": dtype, "shape": shape}


def _shown(name: str, dtype: str, shape: Shape) -> str:
    return f"{name}: {dtype} [{', '.join(str(dim or '?') for dim in shape)}]"
