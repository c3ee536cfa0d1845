"""What ONNX's operators that move, cut and join values compute, in torch, and those on sizes.

Shapes, axes and places must be constants: a graph of one size has no others. Never knows a graph, a
file, or where weights lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edgekit.exporters.onnx_node import Node, Operator, halves, named, torch_pads, word

_END = np.iinfo(np.int64).max
OPERATORS: dict[str, Operator] = {}


@named(OPERATORS, "Reshape")
def _reshape(node: Node, x: Sequence[Any]) -> Any:
    wanted = node.fixed(1, "shape")
    if not node.ask("allowzero", 0):
        wanted = [x[0].shape[at] if n == 0 else n for at, n in enumerate(wanted)]
    return x[0].reshape(wanted)


@named(OPERATORS, "Flatten")
def _flatten(node: Node, x: Sequence[Any]) -> Any:
    axis = node.ask("axis", 1)
    axis += x[0].dim() if axis < 0 else 0
    return x[0].reshape(math.prod(x[0].shape[:axis]), -1)


@named(OPERATORS, "Transpose")
def _transpose(node: Node, x: Sequence[Any]) -> Any:
    return x[0].permute(node.ask("perm") or list(reversed(range(x[0].dim()))))


@named(OPERATORS, "Squeeze")
def _squeeze(node: Node, x: Sequence[Any]) -> Any:
    if len(x) < 2 and "axes" not in node.attributes:
        return torch.squeeze(x[0])
    return torch.squeeze(x[0], tuple(node.fixed(1, "axes")))


@named(OPERATORS, "Unsqueeze")
def _unsqueeze(node: Node, x: Sequence[Any]) -> Any:
    axes = node.fixed(1, "axes")
    rank = x[0].dim() + len(axes)
    made = x[0]
    for axis in sorted(axis % rank for axis in axes):
        made = made.unsqueeze(axis)
    return made


@named(OPERATORS, "Concat")
def _concat(node: Node, x: Sequence[Any]) -> Any:
    return torch.cat(list(x), node.ask("axis"))


@named(OPERATORS, "Split")
def _split(node: Node, x: Sequence[Any]) -> Any:
    axis, count = node.ask("axis", 0), node.ask("num_outputs")
    has = "split" in node.attributes or len(x) > 1
    sizes = node.fixed(1, "split") if has else None
    if sizes is None:
        # The node's outputs tell how many before opset 18.
        count = count or node.ask("outputs")
        sizes = -(-x[0].shape[axis] // count)
    return torch.split(x[0], sizes, axis)


@named(OPERATORS, "Slice")
def _slice(node: Node, x: Sequence[Any]) -> Any:
    starts, ends = node.fixed(1, "starts"), node.fixed(2, "ends")
    has = "axes" in node.attributes or len(x) > 3
    axes = (node.fixed(3, "axes") if has else None) or list(range(len(starts)))
    steps = (node.fixed(4) if len(x) > 4 else None) or [1] * len(starts)
    made = x[0]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        there = range(made.shape[axis])[start:end:step]
        backwards = step < 0
        if backwards:
            there = there[::-1]
        window = slice(there.start, there.stop, there.step) if there else slice(0, 0)
        made = made[(slice(None),) * (axis % made.dim()) + (window,)]
        made = made.flip(axis) if backwards else made
    return made


@named(OPERATORS, "Gather")
def _gather(node: Node, x: Sequence[Any]) -> Any:
    axis = node.ask("axis", 0) % x[0].dim()
    where = node.constants.get(1)
    if where is not None and not np.ndim(where):
        return x[0].select(axis, int(where))
    places = x[1]
    if where is not None:
        where = np.where(where < 0, where + x[0].shape[axis], where)
        if where.size and np.array_equal(where.ravel(), where.ravel()[0] + np.arange(where.size)):
            run = x[0].narrow(axis, int(where.ravel()[0]), where.size)  # one after the other
            return run.unflatten(axis, where.shape)
        places = torch.from_numpy(where)
    if x[0].dtype == torch.bool:  # LiteRT looks up numbers alone
        return _gather(node, [x[0].to(torch.int32), places]).to(torch.bool)
    if axis == 0 and x[0].dim() == 2:
        return F.embedding(places, x[0])
    flat = torch.index_select(x[0], axis, places.reshape(-1))
    return flat.reshape(*x[0].shape[:axis], *places.shape, *x[0].shape[axis + 1 :])


@named(OPERATORS, "GatherElements")
def _gather_elements(node: Node, x: Sequence[Any]) -> Any:
    axis = node.ask("axis", 0)
    places = torch.where(x[1] < 0, x[1] + x[0].shape[axis], x[1])
    return torch.gather(x[0], axis, places)


@named(OPERATORS, "Expand")
def _expand(node: Node, x: Sequence[Any]) -> Any:
    shape = torch.broadcast_shapes(tuple(x[0].shape), tuple(node.fixed(1)))
    return x[0].expand(shape)


@named(OPERATORS, "Tile")
def _tile(node: Node, x: Sequence[Any]) -> Any:
    return x[0].repeat(*node.fixed(1))


@named(OPERATORS, "Pad")
def _pad(node: Node, x: Sequence[Any]) -> Any:
    mode = word(node.ask("mode", "constant"))
    pads = node.fixed(1, "pads")
    given = node.fixed(3) if len(x) > 3 and x[3] is not None else None
    rank = x[0].dim()
    before, after = [0] * rank, [0] * rank
    axes = given if given is not None else range(rank)
    for axis, low, high in zip(axes, *halves(pads), strict=True):
        before[axis], after[axis] = low, high
    ends = torch_pads(before, after)
    while ends[-2:] == [0, 0]:
        del ends[-2:]
    if mode == "constant":
        filler = node.constants.get(2) if len(x) > 2 else None
        value = node.ask("value", 0.0) if filler is None else np.asarray(filler).item()
        return F.pad(x[0], ends, value=value)
    if mode not in ("reflect", "edge"):
        raise node.refused(f"pads by {mode}")
    return F.pad(x[0], ends, mode="replicate" if mode == "edge" else mode)


@named(OPERATORS, "DepthToSpace")
def _depth_to_space(node: Node, x: Sequence[Any]) -> Any:
    block, (n, c, h, w) = node.ask("blocksize"), x[0].shape
    if word(node.ask("mode", "DCR")) == "CRD":
        return F.pixel_shuffle(x[0], block)
    parts = x[0].reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // block**2, h * block, w * block)


@named(OPERATORS, "SpaceToDepth")
def _space_to_depth(node: Node, x: Sequence[Any]) -> Any:
    block, (n, c, h, w) = node.ask("blocksize"), x[0].shape
    parts = x[0].reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * block**2, h // block, w // block)


@named(OPERATORS, "Trilu")
def _trilu(node: Node, x: Sequence[Any]) -> Any:
    diagonal = node.fixed(1)[0] if len(x) > 1 and x[1] is not None else 0
    return (torch.triu if node.ask("upper", 1) else torch.tril)(x[0], diagonal)


# Sizes: of one graph's size they are constants


@named(OPERATORS, "Shape")
def _shape(node: Node, x: Sequence[Any]) -> Any:
    start, end = node.ask("start", 0), node.ask("end", _END)
    return torch.tensor(list(x[0].shape)[start:end], dtype=torch.int64)


@named(OPERATORS, "Size")
def _size(node: Node, x: Sequence[Any]) -> Any:
    return torch.tensor(x[0].numel(), dtype=torch.int64)


@named(OPERATORS, "ConstantOfShape")
def _constant_of_shape(node: Node, x: Sequence[Any]) -> Any:
    value = node.ask("value")
    filler = np.zeros(1, np.float32) if value is None else np.asarray(value).reshape(1)
    return torch.from_numpy(np.full(node.fixed(0), filler[0], filler.dtype))


@named(OPERATORS, "Range")
def _range(node: Node, x: Sequence[Any]) -> Any:
    start, end, step = (node.fixed(place)[0] for place in range(3))
    return torch.arange(start, end, step, dtype=x[0].dtype)
