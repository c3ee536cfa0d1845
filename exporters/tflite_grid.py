"""Weights that training put on a grid of at most 16 levels, stored in 4 bits of a TFLite file: no
weight is rounded.

ai-edge-quantizer writes the form, with steps of its own; here the grid's own steps and levels take
their place. Must never put a weight on a grid that it is not on: such a matrix stays float.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgekit.errors import ExportError, RecipeError
from edgekit.exporters import weight_grid

_IDENTIFIER = b"TFL3"
_LAYER = schema.BuiltinOperator.FULLY_CONNECTED


def write(
    source: Path, kept: Set[str], quantized: Callable[[Set[str]], bytes]
) -> tuple[bytes, dict[str, Any]]:
    """The float file ``source`` with every layer whose weights lie on a grid in 4 bits, and facts
    for the manifest. ``kept`` are names of outputs whose layers stay float; ``quantized`` writes
    the file in 4 bits but for the layers of such names.

    Raises RecipeError where no layer lies on a grid, ExportError where the file came out otherwise
    than asked.
    """
    model = schema.ModelT.InitFromPackedBuf(source.read_bytes(), 0)
    grids: dict[str, tuple[Any, Any]] = {}
    floats = set(kept)
    for output, weights, name in _layers(model):
        found = None if output in kept else weight_grid.of_rows(weights)
        if found is None:
            floats.add(output)
        else:
            grids[name] = found
    if not grids:
        raise RecipeError(
            "no matrix of this model lies on a grid of 16 levels",
            hint="weight_only_wi4b32 rounds any weights; edgekit train vit-qat trains for 4 bits",
        )
    made = schema.ModelT.InitFromPackedBuf(quantized(floats), 0)
    _place(made, grids)
    builder = flatbuffers.Builder(0)
    builder.Finish(made.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output()), {"matrices": len(grids), "kept_float": sorted(floats)}


def _layers(model: Any) -> list[tuple[str, Any, str]]:
    """Of every layer with constant weights: its output's name, those, float32 [outputs, inputs],
    and their name.
    """
    graph = model.subgraphs[0]
    found = []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        if max(code.builtinCode, code.deprecatedBuiltinCode) != _LAYER:
            continue
        tensor = graph.tensors[operator.inputs[1]]
        data = model.buffers[tensor.buffer].data
        if data is None or tensor.type != schema.TensorType.FLOAT32:
            continue
        weights = np.frombuffer(bytes(data), np.float32).reshape(tensor.shape)
        output = graph.tensors[operator.outputs[0]].name
        found.append((_text(output), weights, _text(tensor.name)))
    return found


def _place(model: Any, grids: dict[str, tuple[Any, Any]]) -> None:
    """Put levels and steps where the library put its own."""
    left = dict(grids)
    for tensor in model.subgraphs[0].tensors:
        name = _text(tensor.name)
        if tensor.type != schema.TensorType.INT4 or name not in left:
            continue
        levels, steps = left.pop(name)
        how = tensor.quantization
        packed = _packed(levels)
        buffer = model.buffers[tensor.buffer]
        if (
            len(how.scale) != len(steps)
            or how.quantizedDimension
            or len(buffer.data) != len(packed)
        ):
            raise ExportError(f"ai-edge-quantizer wrote {name[-60:]} in another form than asked")
        how.scale, how.zeroPoint = steps, np.zeros(len(steps), np.int64)
        buffer.data = packed
    if left:
        raise ExportError(f"ai-edge-quantizer wrote no 4 bits for {min(left)[-60:]}")


def _packed(levels: Any) -> Any:
    """int8 [outputs, inputs] from -8 to 7 as two in a byte, the first in the lower half."""
    flat = levels.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    return flat[0::2] | flat[1::2] << 4


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)
