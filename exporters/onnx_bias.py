"""Bias correction: what quantization adds to a channel on average is taken from its bias again.

Rounded weights and ranges move the mean of a layer's outputs, and every layer behind sees that.
Layer by layer from the first, the mean of each channel over samples is compared with the float
model's, and the difference goes into the bias: M. Nagel et al., Data-Free Quantization, section 4.2
(https://arxiv.org/abs/1906.04721), with samples in the place of statistics. Costs nothing at run
time. Must never judge whether it helped: who calls it does, on other samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from edgekit.exporter import Progress
from edgekit.exporters import onnx_graph, ort_quantization
from edgekit.exporters.onnx_graph import Graph

Feeds = Sequence[Mapping[str, Any]]
_LAYERS = ("Conv", "Gemm")
_TOP = 2**31 - 1


def apply(source: Path, quantized: Path, samples: Feeds, out: Path, progress: Progress) -> int:
    """Write ``quantized``, a file of QuantizeLinear and DequantizeLinear made of ``source`` with
    the same names of nodes, to ``out`` with other biases; how many layers got them.

    Raises what the engine raises.
    """
    model = onnx_graph.load(quantized)
    layers = _layers(Graph(model))
    wanted = _means(onnx_graph.load(source), list(layers), samples)
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = 0
    for number, (name, (bias, scale)) in enumerate(layers.items()):
        progress("correct biases", number, len(layers))
        if name not in wanted:
            continue
        off = wanted[name] - _means(model, [name], samples)[name]
        old, steps = (numpy_helper.to_array(arrays[each]) for each in (bias, scale))
        moved = old + np.rint(off / steps)
        fresh = np.clip(moved, -_TOP, _TOP).astype(old.dtype)
        if (fresh != old).any():
            arrays[bias].CopyFrom(numpy_helper.from_array(fresh, bias))
            changed += 1
    progress("correct biases", len(layers), len(layers))
    onnx_graph.save(model, out)
    return changed


def _layers(graph: Graph) -> dict[str, tuple[str, str]]:
    """Node with an int32 bias of its own -> the names of that and of its scales, in order."""
    found = {}
    for node in graph.nodes:
        bias = graph.maker(node.input[2], "DequantizeLinear") if len(node.input) > 2 else None
        if node.op_type not in _LAYERS or bias is None:
            continue
        values, scales = (graph.constant(name) for name in bias.input[:2])
        if values is None or scales is None or values.dtype != np.int32:
            continue
        if len(graph.takers[bias.input[0]]) == 1 and scales.size in (1, values.size):
            found[node.name] = bias.input[0], bias.input[1]
    return found


def _means(model: Any, names: list[str], samples: Feeds) -> dict[str, Any]:
    """Node -> the mean of each channel of its output, float64 [channels]."""
    nodes = {node.name: node.output[0] for node in model.graph.node if node.name in set(names)}
    if not nodes:
        return {}  # the engine takes an empty list of outputs for all of them
    copy = type(model).FromString(model.SerializeToString())
    known = {value.name for value in copy.graph.output}
    copy.graph.output.extend(
        helper.make_empty_tensor_value_info(each) for each in nodes.values() if each not in known
    )
    engine = ort_quantization.session(copy)
    sums: dict[str, Any] = {}
    for sample in samples:
        for name, value in zip(nodes, engine.run(list(nodes.values()), dict(sample)), strict=True):
            axes = (0, *range(2, value.ndim))
            sums[name] = sums.get(name, 0.0) + value.mean(axes, dtype=np.float64)
    return {name: total / len(samples) for name, total in sums.items()}
