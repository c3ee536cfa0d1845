"""Tiny sound ONNX and TFLite files where hostile ones start: in floats, in 8 bits, in 4, with the
weights elsewhere; and how they are broken.

Knows what edgekit's exporters write; must never need one of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tiny_tflite
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = "weights.bin"
_SHAPE, _ROWS = ["batch", 1, 8, 8], 32  # of what goes in, and how many rows come out of one
_MICROSOFT = "com.microsoft"
_LIES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def _kernel() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((8, 8)).astype(np.float32)
    return weights, rng.standard_normal((4, 1, 3, 3)).astype(np.float32)


def _model(nodes: list[Any], constants: dict[str, Any]) -> Any:
    """Names of free axes in front, a product of eight behind."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, _SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    if any(node.domain for node in nodes):
        opsets.append(helper.make_opsetid(_MICROSOFT, 1))
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _floats(product: list[Any] | None = None, more: dict[str, Any] | None = None) -> Any:
    weights, kernel = _kernel()
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Reshape", ["r", "s"], ["flat"], name="reshape"),
    ]
    product = product or [helper.make_node("MatMul", ["flat", "w"], ["y"], name="product")]
    constants = {"w": weights} if more is None else more
    shape = {"k": kernel, "s": np.array([-1, 8], np.int64)}
    return _model([*nodes, *product], constants | shape)


def _int8() -> Any:
    """QDQ: both ends of the convolution and of the product in 8 bits, a scale for each channel."""
    weights, kernel = _kernel()
    constants: dict[str, Any] = {"s": np.array([-1, 8], np.int64)}
    nodes: list[Any] = []

    def rounded(value: str, scale: float) -> str:
        constants[f"{value}_scale"] = np.array(scale, np.float32)
        constants[f"{value}_zero"] = np.array(128, np.uint8)
        grid = [f"{value}_scale", f"{value}_zero"]
        for kind, given, made in (
            ("QuantizeLinear", value, f"{value}_q"),
            ("DequantizeLinear", f"{value}_q", f"{value}_d"),
        ):
            nodes.append(helper.make_node(kind, [given, *grid], [made], name=made))
        return f"{value}_d"

    def stored(name: str, array: Any, axis: int) -> str:
        others = tuple(i for i in range(array.ndim) if i != axis)
        scales = np.abs(array).max(axis=others, keepdims=True) / 127
        constants[name] = np.round(array / scales).astype(np.int8)
        constants[f"{name}_scale"] = scales.ravel().astype(np.float32)
        constants[f"{name}_zero"] = np.zeros(scales.size, np.int8)
        given = [name, f"{name}_scale", f"{name}_zero"]
        made = f"{name}_d"
        nodes.append(helper.make_node("DequantizeLinear", given, [made], axis=axis, name=made))
        return made

    ends = [rounded("x", 0.03), stored("k", kernel, 0)]
    nodes.append(helper.make_node("Conv", ends, ["c"], pads=[1, 1, 1, 1], name="conv"))
    nodes.append(helper.make_node("Relu", ["c"], ["r"], name="relu"))
    nodes.append(helper.make_node("Reshape", [rounded("r", 0.1), "s"], ["flat"], name="reshape"))
    ends = [rounded("flat", 0.1), stored("w", weights, 1)]
    nodes.append(helper.make_node("MatMul", ends, ["y"], name="product"))
    return _model(nodes, constants)


def _int4() -> Any:
    """The product in blocks of 4 bits: MatMulNBits."""
    rng = np.random.default_rng(1)
    blocks = {
        "w": rng.integers(0, 256, (8, 1, 8), np.uint8),
        "w_scales": rng.standard_normal(8).astype(np.float32),
    }
    sizes = {"K": 8, "N": 8, "bits": 4, "block_size": 16}
    node = helper.make_node(
        *("MatMulNBits", ["flat", *blocks], ["y"]), name="product", domain=_MICROSOFT, **sizes
    )
    return _floats([node], blocks)


def onnx_seeds() -> dict[str, bytes]:
    """Name -> file. Of "beside" the weights are ``beside``'s."""
    far = _floats()
    offset = 0
    for tensor in far.graph.initializer:
        if tensor.name == "s":
            continue
        place = {"location": WEIGHTS, "offset": offset, "length": len(tensor.raw_data)}
        offset += len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
    models = {"float": _floats(), "int8": _int8(), "int4": _int4(), "beside": far}
    return {name: bytes(model.SerializeToString()) for name, model in models.items()}


def beside(folder: Path) -> None:
    """Write the weights of the seed of that name."""
    (folder / WEIGHTS).write_bytes(b"".join(array.tobytes() for array in _kernel()))


def onnx_mutants(raw: bytes, count: int, seed: str) -> Iterator[bytes]:
    """Flips, cuts, doubled and lost stretches, and lengths that lie: the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        out = bytearray(raw)
        start = rng.randrange(len(out))
        end = min(len(out), start + rng.randrange(1, 64))
        match rng.randrange(5):
            case 0:
                for _ in range(rng.choice((1, 1, 2, 16))):
                    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            case 1:
                del out[start:]
            case 2:
                out[start:end] = out[start:end] * 2
            case 3:
                del out[start:end]
            case _:
                out[start : start + 1] = rng.choice((b"\xff" * 9 + b"\x01", b"\xff\xff\x7f", b"\0"))
        yield bytes(out)


def rewired(raw: bytes, count: int, seed: str) -> Iterator[bytes]:
    """Files that are sound as such, of graphs that are not: other operators, inputs, attributes,
    shapes, types and values. The same for the same seed.
    """
    rng = random.Random(seed)
    for _ in range(count):
        model = onnx.ModelProto.FromString(raw)
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice(_CHANGES)(model.graph, rng)
        yield bytes(model.SerializeToString())


def _operator(graph: Any, rng: random.Random) -> None:
    kinds = ("Relu", "MatMul", "Gemm", "Conv", "Softmax", "Transpose", "Reshape", "Erf", "Mul")
    kinds += ("LayerNormalization", "DequantizeLinear", "Shape", "Loop", "Nonsense")
    rng.choice(graph.node).op_type = rng.choice(kinds)


def _inputs(graph: Any, rng: random.Random) -> None:
    node = rng.choice(graph.node)
    names = [each.name for each in graph.initializer] + [
        name for n in graph.node for name in n.output
    ]
    match rng.randrange(4):
        case 0:
            del node.input[rng.randrange(len(node.input)) :]
        case 1:
            node.input[rng.randrange(len(node.input))] = rng.choice([*names, "x", "", "nowhere"])
        case 2:
            node.input.append(rng.choice([*names, ""]))
        case _:
            node.output[0] = rng.choice([*names, "", "elsewhere"])


def _nodes(graph: Any, rng: random.Random) -> None:
    at = rng.randrange(len(graph.node))
    match rng.randrange(3):
        case 0:
            del graph.node[at]
        case 1:
            graph.node.append(graph.node[at])
        case _:
            graph.node[at].domain = rng.choice((_MICROSOFT, "own"))


def _attribute(graph: Any, rng: random.Random) -> None:
    having = [node for node in graph.node if node.attribute]
    if not having:
        return
    found = rng.choice(rng.choice(having).attribute)
    number = rng.choice((-1, 0, 1, 3, 1 << 20, (1 << 31) - 1, -(1 << 63)))
    match rng.randrange(4):
        case 0:
            found.i = number
        case 1 if found.ints:
            found.ints[rng.randrange(len(found.ints))] = number
        case 2:
            found.CopyFrom(helper.make_attribute(found.name, rng.choice((0.5, "text", [1, 2]))))
        case _:
            found.name = rng.choice(("axis", "perm", "pads", "bits", "block_size", "K", "none"))


def _shape(graph: Any, rng: random.Random) -> None:
    dims = graph.input[0].type.tensor_type.shape.dim
    match rng.randrange(3):
        case 0:
            rng.choice(dims).dim_value = rng.choice((0, 1, 3, 1 << 20, 1 << 40))
        case 1:
            graph.input[0].type.tensor_type.elem_type = rng.randrange(1, 17)
        case _:
            tensor = rng.choice(graph.initializer)
            if not tensor.dims:
                return
            whole = int(np.prod(tensor.dims))
            del tensor.dims[:]
            tensor.dims.extend(rng.choice(([whole], [1, whole], [whole, 1], [1] * 9 + [whole])))


def _values(graph: Any, rng: random.Random) -> None:
    tensor = rng.choice(graph.initializer)
    size = len(tensor.raw_data)
    word = rng.choice((b"\0", b"\xff", b"\x80", b"\x7f\xc0", rng.randbytes(4)))
    if size:
        tensor.raw_data = (word * size)[:size]


_CHANGES = (_operator, _inputs, _nodes, _attribute, _shape, _values)


def tflite_seeds() -> dict[str, bytes]:
    """Name -> file. Each takes ids or pixels, told by its header."""
    return {
        "float": tiny_tflite.table(),
        "int8": tiny_tflite.static(np.ones((4, 16), np.float32), np.ones(4, np.float32)),
        "int4": tiny_tflite.four_bits(),
    }


def tflite_mutants(raw: bytes, count: int, seed: str) -> Iterator[bytes]:
    """Flips, cuts, doubled and lost stretches, and numbers that lie: the same for the same seed.

    Most of them where the tables are: the middle of the file is weights.
    """
    rng = random.Random(seed)
    ends = [*range(min(1200, len(raw))), *range(max(0, len(raw) - 1200), len(raw))]
    for _ in range(count):
        out = bytearray(raw)
        start = rng.choice(ends)
        end = min(len(out), start + rng.randrange(1, 64))
        match rng.randrange(6):
            case 0 | 1:
                for _ in range(rng.choice((1, 1, 2, 16))):
                    out[rng.choice(ends)] ^= 1 << rng.randrange(8)
            case 2:
                del out[rng.randrange(len(out)) :]
            case 3:
                out[start:end] = rng.choice((b"", out[start:end] * 2, rng.randbytes(end - start)))
            case _:
                at = start & ~3
                out[at : at + 4] = rng.choice(_LIES).to_bytes(4, "little")
        yield bytes(out)
