"""What ONNX's operators on single values, products, norms and sums compute, in torch.

Knows https://onnx.ai/onnx/operators/ from opset 9 on; never a graph, a file, or where weights lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import helper

from edgekit.exporters.onnx_node import Node, Operator, named, word

OPERATORS: dict[str, Operator] = {}


def _plain(function: Callable[..., Any]) -> Operator:
    return lambda node, x: function(*x)


def _folded(function: Callable[[Any, Any], Any]) -> Operator:
    def run(node: Node, x: Sequence[Any]) -> Any:
        made = x[0]
        for each in x[1:]:
            made = function(made, each)
        return made

    return run


OPERATORS |= {
    name: _plain(getattr(torch, name.lower()))
    for name in (
        *("Abs", "Neg", "Sign", "Floor", "Ceil", "Round", "Sqrt", "Reciprocal", "Exp", "Log"),
        *("Erf", "Sin", "Cos", "Tan", "Tanh", "Sigmoid", "IsNaN", "Where"),
        *("Add", "Sub", "Mul"),
    )
}
OPERATORS |= {
    "Relu": _plain(F.relu),
    "Softplus": _plain(F.softplus),
    "Softsign": _plain(F.softsign),
    "HardSwish": _plain(F.hardswish),
    "Mish": _plain(F.mish),
    "Identity": _plain(lambda x: x),
    "Dropout": lambda node, x: x[0],
    "And": _plain(torch.logical_and),
    "Or": _plain(torch.logical_or),
    "Xor": _plain(torch.logical_xor),
    "Not": _plain(torch.logical_not),
    "Equal": _plain(torch.eq),
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "Min": _folded(torch.minimum),
    "Max": _folded(torch.maximum),
    "Sum": _folded(torch.add),
    "Mean": lambda node, x: sum(x[1:], x[0]) / len(x),
    "Elu": lambda node, x: F.elu(x[0], node.ask("alpha", 1.0)),
    "Celu": lambda node, x: F.celu(x[0], node.ask("alpha", 1.0)),
    "LeakyRelu": lambda node, x: F.leaky_relu(x[0], node.ask("alpha", 0.01)),
    "Gelu": lambda node, x: F.gelu(x[0], approximate=word(node.ask("approximate", "none"))),
    "HardSigmoid": lambda node, x: torch.clamp(
        x[0] * node.ask("alpha", 0.2) + node.ask("beta", 0.5), 0, 1
    ),
    "PRelu": lambda node, x: torch.where(x[0] < 0, x[0] * x[1], x[0]),
    "Pow": lambda node, x: torch.pow(x[0], x[1].to(x[0].dtype)),
    "Einsum": lambda node, x: torch.einsum(word(node.ask("equation")), *x),
    "GlobalAveragePool": lambda node, x: x[0].mean(tuple(range(2, x[0].dim())), keepdim=True),
    "GlobalMaxPool": lambda node, x: torch.amax(x[0], tuple(range(2, x[0].dim())), keepdim=True),
}


@named(OPERATORS, "Div")
def _div(node: Node, x: Sequence[Any]) -> Any:
    whole = not x[0].is_floating_point()
    return torch.div(x[0], x[1], rounding_mode="trunc" if whole else None)


@named(OPERATORS, "Mod")
def _mod(node: Node, x: Sequence[Any]) -> Any:
    return (torch.fmod if node.ask("fmod", 0) else torch.remainder)(x[0], x[1])


@named(OPERATORS, "Clip")
def _clip(node: Node, x: Sequence[Any]) -> Any:
    made = x[0]
    for place, name, bound in ((1, "min", torch.clamp_min), (2, "max", torch.clamp_max)):
        limit = x[place] if len(x) > place else node.ask(name)
        if limit is not None:
            fixed = node.constants.get(place)
            made = bound(made, limit if fixed is None else np.asarray(fixed).item())
    return made


@named(OPERATORS, "Cast")
def _cast(node: Node, x: Sequence[Any]) -> Any:
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(node.ask("to")))
    return x[0].to(torch.from_numpy(np.zeros(1, kind)).dtype)


# Products


@named(OPERATORS, "MatMul")
def _matmul(node: Node, x: Sequence[Any]) -> Any:
    # What lowers this knows a layer by its own form, and a product of two values by another.
    if node.constants.get(1) is not None and x[1].dim() == 2:
        return F.linear(x[0], x[1].t())
    return torch.matmul(x[0], x[1])


@named(OPERATORS, "Gemm")
def _gemm(node: Node, x: Sequence[Any]) -> Any:
    left = x[0].t() if node.ask("transA", 0) else x[0]
    right = x[1] if node.ask("transB", 0) else x[1].t()
    alpha, beta = node.ask("alpha", 1.0), node.ask("beta", 1.0)
    bias = x[2] if len(x) > 2 else None
    if alpha == beta == 1.0 and (bias is None or bias.shape == right.shape[:1]):
        return F.linear(left, right, bias)
    made = alpha * F.linear(left, right)
    return made if bias is None else made + beta * bias


# Norms and sums


@named(OPERATORS, "BatchNormalization")
def _batch_norm(node: Node, x: Sequence[Any]) -> Any:
    if node.ask("training_mode", 0):
        raise node.refused("is in training")
    return F.batch_norm(x[0], x[3], x[4], x[1], x[2], False, 0.0, node.ask("epsilon", 1e-5))


@named(OPERATORS, "InstanceNormalization")
def _instance_norm(node: Node, x: Sequence[Any]) -> Any:
    return F.instance_norm(x[0], weight=x[1], bias=x[2], eps=node.ask("epsilon", 1e-5))


@named(OPERATORS, "GroupNormalization")
def _group_norm(node: Node, x: Sequence[Any]) -> Any:
    groups = node.ask("num_groups")
    scale, bias = x[1], x[2]
    if scale.shape[0] != x[0].shape[1]:  # before opset 21 one for each group
        scale, bias = (each.repeat_interleave(x[0].shape[1] // groups) for each in (scale, bias))
    return F.group_norm(x[0], groups, scale, bias, node.ask("epsilon", 1e-5))


@named(OPERATORS, "LayerNormalization")
def _layer_norm(node: Node, x: Sequence[Any]) -> Any:
    shape = x[0].shape[node.ask("axis", -1) :]
    bias = x[2] if len(x) > 2 else None
    scale = x[1].expand(shape)
    return F.layer_norm(x[0], shape, scale, bias, node.ask("epsilon", 1e-5))


@named(OPERATORS, "Softmax", "LogSoftmax")
def _softmax(node: Node, x: Sequence[Any]) -> Any:
    run = F.softmax if node.op == "Softmax" else F.log_softmax
    axis = node.ask("axis", -1 if node.opset >= 13 else 1)
    last = x[0].dim() - 1
    if node.opset >= 13 or axis in (-1, last):
        return run(x[0], axis)
    # Of old it was over all axes from that one on.
    flat = x[0].reshape(math.prod(x[0].shape[:axis]), -1)
    return run(flat, -1).reshape(x[0].shape)


_SUMS: dict[str, Callable[..., Any]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceL1": lambda x, axes, keepdim: x.abs().sum(axes, keepdim=keepdim),
    "ReduceL2": lambda x, axes, keepdim: (x * x).sum(axes, keepdim=keepdim).sqrt(),
    "ReduceSumSquare": lambda x, axes, keepdim: (x * x).sum(axes, keepdim=keepdim),
    "ReduceLogSumExp": torch.logsumexp,
}


@named(OPERATORS, *_SUMS)
def _reduce(node: Node, x: Sequence[Any]) -> Any:
    inputs = len(x) > 1 or "axes" in node.attributes
    axes = node.fixed(1, "axes") if inputs else None
    if not axes:
        if node.ask("noop_with_empty_axes", 0):
            return x[0]
        axes = list(range(x[0].dim()))
    return _SUMS[node.op](x[0], axes, keepdim=bool(node.ask("keepdims", 1)))


@named(OPERATORS, "ReduceProd")
def _product(node: Node, x: Sequence[Any]) -> Any:
    inputs = len(x) > 1 or "axes" in node.attributes
    axes = (node.fixed(1, "axes") if inputs else None) or list(range(x[0].dim()))
    keep, made = bool(node.ask("keepdims", 1)), x[0]
    for axis in sorted((axis % x[0].dim() for axis in axes), reverse=True):
        made = torch.prod(made, axis, keepdim=keep)
    return made


@named(OPERATORS, "ArgMax", "ArgMin")
def _arg(node: Node, x: Sequence[Any]) -> Any:
    if node.ask("select_last_index", 0):
        raise node.refused("wants the last of equal values")
    run = torch.argmax if node.op == "ArgMax" else torch.argmin
    return run(x[0], node.ask("axis", 0), keepdim=bool(node.ask("keepdims", 1)))


@named(OPERATORS, "CumSum")
def _cumsum(node: Node, x: Sequence[Any]) -> Any:
    if node.ask("exclusive", 0) or node.ask("reverse", 0):
        raise node.refused("runs backwards, or leaves itself out")
    return torch.cumsum(x[0], node.fixed(1)[0], dtype=x[0].dtype)
