"""Small graphs of convolutions made by hand, and samples for them: what quantizers are tried on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIDE = 8, 12


def convolution(
    name: str, weights: Any, bias: Any, value: str, **attributes: Any
) -> tuple[Any, list[Any]]:
    """A Conv of ``value`` with the output ``name``, and its two constants."""
    names = [f"{name}.w", f"{name}.b"]
    pads = [size // 2 for size in weights.shape[2:]] * 2
    node = helper.make_node("Conv", [value, *names], [name], name, pads=pads, **attributes)
    return node, [
        numpy_helper.from_array(np.asarray(array, np.float32), each)
        for array, each in zip((weights, bias), names, strict=True)
    ]


def chain(*between: Any, scales: Any = None, depthwise: bool = False) -> Any:
    """Two convolutions with ``between`` behind the first, each node given as (type, attributes).
    ``scales`` multiply the channels in between, and the second takes them back.
    """
    generator = np.random.default_rng(0)
    scales = np.ones(CHANNELS, np.float32) if scales is None else scales
    first = generator.standard_normal((CHANNELS, 3, 3, 3)) / 5 * scales[:, None, None, None]
    bias = generator.standard_normal(CHANNELS) * scales
    if depthwise:
        second = generator.standard_normal((CHANNELS, 1, 3, 3)) / scales[:, None, None, None]
    else:
        second = generator.standard_normal((6, CHANNELS, 1, 1)) / scales[None, :, None, None]
    node, constants = convolution("one", first, bias, "x")
    nodes, value = [node], "one"
    for number, (kind, more) in enumerate(between):
        nodes.append(helper.make_node(kind, [value], [f"between{number}"], f"b{number}", **more))
        value = f"between{number}"
    group = CHANNELS if depthwise else 1
    bias = generator.standard_normal(len(second))
    node, more = convolution("two", second, bias, value, group=group)
    return model([*nodes, node], [*constants, *more], "two")


def model(nodes: list[Any], constants: list[Any], output: str) -> Any:
    """A ModelProto of an image ``x`` and one output."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def samples(count: int, *, seed: int = 1, mean: float = 0.5) -> list[dict[str, Any]]:
    generator = np.random.default_rng(seed)
    shape = (1, 3, SIDE, SIDE)
    return [
        {"x": generator.standard_normal(shape, np.float32) + np.float32(mean)} for _ in range(count)
    ]


def run(model: Any, feed: dict[str, Any]) -> Any:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feed)[0]
