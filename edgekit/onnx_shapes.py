"""The shape of every value of an ONNX graph, from its header alone.

Knows what each operator does to a shape, and follows the whole numbers that shapes are computed
from; never a weight, an engine, or the package onnx.

Operators: https://onnx.ai/onnx/operators/ and, for those of com.microsoft,
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.formats.foreign import shown
from edgekit.formats.onnx import MAX_INT64, OnnxHeader, OnnxNode, OnnxTensor

Shape = tuple[int, ...]
_MAX = 1 << 40  # values of a tensor; beyond it lies nonsense
_MAX_KNOWN = 64  # whole numbers that are followed: shapes are short
# What a graph that contradicts itself makes of the rules below.
BROKEN = (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError, OverflowError)


class Shapes:
    """Walks through a graph in its order. ``shapes`` has every value's shape in the end, ``known``
    the whole numbers that stand in some of them.

    Raises UnsupportedModelError for an operator whose result cannot be told, SourceError for a
    graph that contradicts itself.
    """

    def __init__(self, header: OnnxHeader, inputs: dict[str, Shape]) -> None:
        self.shapes: dict[str, Shape] = dict(inputs)
        self.known: dict[str, tuple[int, ...]] = {}
        for tensor in header.initializers:
            self._constant(tensor.name, tensor)
        stated = {
            value.name: shape
            for value in (*header.value_info, *header.outputs)
            if (shape := _fixed(value.shape)) is not None
        }
        for node in header.nodes:
            self._visit(node, stated)

    def of(self, node: OnnxNode, index: int) -> Shape:
        """The shape of an input. Raises SourceError where there is none."""
        name = node.inputs[index] if index < len(node.inputs) else ""
        if name not in self.shapes:
            raise SourceError(f"{called(node)} has no input {index}")
        return self.shapes[name]

    def numbers(self, node: OnnxNode, index: int) -> tuple[int, ...] | None:
        """The whole numbers in an input, None where they are not known."""
        return self.known.get(node.inputs[index]) if index < len(node.inputs) else None

    def has(self, node: OnnxNode, index: int) -> bool:
        """Whether an optional input is given."""
        return index < len(node.inputs) and bool(node.inputs[index])

    def _constant(self, name: str, tensor: OnnxTensor) -> None:
        self.shapes[name] = tensor.shape
        if tensor.numbers is not None:
            self.known[name] = tensor.numbers

    def _visit(self, node: OnnxNode, stated: dict[str, Shape]) -> None:
        try:
            if node.op_type == "Constant":
                self._of_constant(node)
            else:
                self._keep(node, _RULES[node.op_type](self, node))
        except BROKEN:
            found = [stated[name] for name in node.outputs if name in stated]
            if not found or len(found) < len(node.outputs):
                raise UnsupportedModelError(
                    f"the shape of what {called(node)} computes cannot be told from the header",
                    hint="write the shapes into the file (onnx.shape_inference), or plan from the"
                    " folder that the model was made from",
                ) from None
            for name, shape in zip(node.outputs, found, strict=True):
                self.shapes[name] = shape

    def _keep(self, node: OnnxNode, found: Sequence[Shape]) -> None:
        for name, shape in zip(node.outputs, found, strict=False):
            if not all(type(size) is int for size in shape):
                raise TypeError
            if len(shape) > _MAX_KNOWN or min(shape, default=0) < 0 or math.prod(shape) > _MAX:
                raise SourceError(f"{called(node)} would compute an absurd shape")
            self.shapes[name] = shape
        numbers = _numbers(self, node)
        # Beyond 64 bits no engine computes them; squares of squares would never end.
        if numbers is None or len(numbers) > _MAX_KNOWN:
            return
        if all(abs(number) <= MAX_INT64 for number in numbers):
            self.known[node.outputs[0]] = numbers

    def _of_constant(self, node: OnnxNode) -> None:
        name, attributes = node.outputs[0], node.attributes
        value = attributes.get("value")
        if isinstance(value, OnnxTensor):
            self._constant(name, value)
            return
        given = next((attributes[key] for key in _CONSTANTS if key in attributes), ())
        numbers = given if isinstance(given, tuple) else (given,)
        self.shapes[name] = (len(numbers),) if isinstance(given, tuple) else ()
        if all(type(each) is int for each in numbers) and len(numbers) <= _MAX_KNOWN:
            self.known[name] = numbers


_CONSTANTS = ("value_int", "value_ints", "value_float", "value_floats", "value_string")


def called(node: OnnxNode) -> str:
    """An operator, for messages."""
    return f"{shown(node.op_type)} ({shown(node.name or ''.join(node.outputs[:1]))})"


def _fixed(shape: Sequence[int | str | None]) -> Shape | None:
    """The shape, where every size is stated: none at all says nothing."""
    sizes = tuple(size for size in shape if isinstance(size, int))
    return sizes if sizes and len(sizes) == len(shape) else None


# Rules: shapes of a node's outputs


def broadcast(*shapes: Shape) -> Shape:
    """https://numpy.org/doc/stable/user/basics.broadcasting.html. Raises ValueError."""
    rank = max(map(len, shapes))
    sizes = []
    for axis in range(rank):
        found = {s[axis - rank + len(s)] for s in shapes if axis - rank + len(s) >= 0} - {1}
        if len(found) > 1:
            raise ValueError
        sizes.append(found.pop() if found else 1)
    return tuple(sizes)


def _same(walk: Shapes, node: OnnxNode) -> list[Shape]:
    return [walk.of(node, 0)] * len(node.outputs)


def _together(walk: Shapes, node: OnnxNode) -> list[Shape]:
    return [broadcast(*(walk.of(node, i) for i in range(len(node.inputs)) if node.inputs[i]))]


def _conv(walk: Shapes, node: OnnxNode, data: int = 0, weights: int = 1) -> list[Shape]:
    x, w = walk.of(node, data), walk.of(node, weights)
    return [(x[0], w[0], *_windows(node, x[2:], w[2:]))]


def _pool(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x = walk.of(node, 0)
    return [(*x[:2], *_windows(node, x[2:], tuple(node.attributes["kernel_shape"])))]


def _windows(node: OnnxNode, sizes: Shape, kernel: Shape) -> Shape:
    """How many places a window has along each axis."""
    rank, attributes = len(sizes), node.attributes
    strides = attributes.get("strides", (1,) * rank)
    dilations = attributes.get("dilations", (1,) * rank)
    pads = attributes.get("pads", (0,) * 2 * rank)
    padding = attributes.get("auto_pad", "NOTSET")
    found = []
    for axis in range(rank):
        wide, step = dilations[axis] * (kernel[axis] - 1) + 1, strides[axis]
        if padding in ("SAME_UPPER", "SAME_LOWER"):
            found.append(-(-sizes[axis] // step))
            continue
        room = sizes[axis] - wide
        if padding != "VALID":
            room += pads[axis] + pads[axis + rank]
        if attributes.get("ceil_mode"):
            room += step - 1
        found.append(room // step + 1)
    return tuple(found)


def _global_pool(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x = walk.of(node, 0)
    return [(*x[:2], *(1 for _ in x[2:]))]


def _matmul(walk: Shapes, node: OnnxNode, left: int = 0, right: int = 1) -> list[Shape]:
    a, b = walk.of(node, left), walk.of(node, right)
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        raise ValueError
    return [(*broadcast(a[:-2], b[:-2]), a[-2], b[-1])]


def _blocks(walk: Shapes, node: OnnxNode) -> list[Shape]:
    return [(*walk.of(node, 0)[:-1], node.attributes["N"])]


def _gemm(walk: Shapes, node: OnnxNode) -> list[Shape]:
    (rows, inner), (depth, columns) = walk.of(node, 0), walk.of(node, 1)
    if node.attributes.get("transA"):
        rows, inner = inner, rows
    if node.attributes.get("transB"):
        depth, columns = columns, depth
    if inner != depth:
        raise ValueError
    return [(rows, columns)]


def _transpose(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x = walk.of(node, 0)
    return [tuple(x[axis] for axis in node.attributes.get("perm", range(len(x))[::-1]))]


def _reshape(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x = walk.of(node, 0)
    wanted = list(_told(walk.numbers(node, 1)))
    if not node.attributes.get("allowzero"):
        wanted = [x[i] if size == 0 else size for i, size in enumerate(wanted)]
    if -1 in wanted:
        wanted[wanted.index(-1)] = math.prod(x) // math.prod(s for s in wanted if s != -1)
    if math.prod(wanted) != math.prod(x):
        raise ValueError
    return [tuple(wanted)]


def _flatten(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x, axis = walk.of(node, 0), node.attributes.get("axis", 1)
    return [(math.prod(x[:axis]), math.prod(x[axis:]))]


def _axes(walk: Shapes, node: OnnxNode) -> tuple[int, ...] | None:
    """Of Squeeze, Unsqueeze and the reductions: an attribute once, an input in newer sets."""
    if "axes" in node.attributes:
        axes: tuple[int, ...] = tuple(node.attributes["axes"])
        return axes
    return _told(walk.numbers(node, 1)) if walk.has(node, 1) else None


def _unsqueeze(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x, axes = list(walk.of(node, 0)), _told(_axes(walk, node))
    for axis in sorted(each % (len(x) + len(axes)) for each in axes):
        x.insert(axis, 1)
    return [tuple(x)]


def _squeeze(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x, axes = walk.of(node, 0), _axes(walk, node)
    gone = {i for i, s in enumerate(x) if s == 1} if axes is None else {a % len(x) for a in axes}
    return [tuple(size for i, size in enumerate(x) if i not in gone)]


def _reduce(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x, axes = walk.of(node, 0), _axes(walk, node)
    gone = set(range(len(x))) if axes is None else {axis % len(x) for axis in axes}
    keep = node.attributes.get("keepdims", 1)
    return [tuple(1 if i in gone else s for i, s in enumerate(x) if keep or i not in gone)]


def _arg(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x = list(walk.of(node, 0))
    axis = node.attributes.get("axis", 0) % len(x)
    x[axis : axis + 1] = [1] if node.attributes.get("keepdims", 1) else []
    return [tuple(x)]


def _concat(walk: Shapes, node: OnnxNode) -> list[Shape]:
    parts = [walk.of(node, index) for index in range(len(node.inputs))]
    axis = node.attributes["axis"] % len(parts[0])
    x = list(parts[0])
    x[axis] = sum(part[axis] for part in parts)
    return [tuple(x)]


def _split(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x, count = walk.of(node, 0), len(node.outputs)
    axis = node.attributes.get("axis", 0) % len(x)
    sizes = node.attributes.get("split") or (walk.numbers(node, 1) if walk.has(node, 1) else None)
    if sizes is None:
        each = -(-x[axis] // count)
        sizes = [min(each, x[axis] - each * i) for i in range(count)]
    return [(*x[:axis], size, *x[axis + 1 :]) for size in sizes]


def _slice(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x = list(walk.of(node, 0))
    for axis, part in _parts(walk, node, len(x)).items():
        x[axis] = len(range(x[axis])[part])
    return [tuple(x)]


def _parts(walk: Shapes, node: OnnxNode, rank: int) -> dict[int, slice]:
    """axis -> what a Slice takes of it."""
    starts, ends = _told(walk.numbers(node, 1)), _told(walk.numbers(node, 2))
    axes = _told(walk.numbers(node, 3)) if walk.has(node, 3) else tuple(range(len(starts)))
    steps = _told(walk.numbers(node, 4)) if walk.has(node, 4) else (1,) * len(starts)
    return {
        axis % rank: slice(start, end if step > 0 or end > -(1 << 31) else None, step)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }


def _gather(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x, index = walk.of(node, 0), walk.of(node, 1)
    axis = node.attributes.get("axis", 0) % len(x)
    return [(*x[:axis], *index, *x[axis + 1 :])]


def _expand(walk: Shapes, node: OnnxNode) -> list[Shape]:
    return [broadcast(walk.of(node, 0), _told(walk.numbers(node, 1)))]


def _filled(walk: Shapes, node: OnnxNode) -> list[Shape]:
    return [_told(walk.numbers(node, 0))]


def _range(walk: Shapes, node: OnnxNode) -> list[Shape]:
    return [(len(range(*(_told(walk.numbers(node, i))[0] for i in range(3)))),)]


def _shape(walk: Shapes, node: OnnxNode) -> list[Shape]:
    return [(len(_cut(walk, node)),)]


def _cut(walk: Shapes, node: OnnxNode) -> Shape:
    whole = node.attributes.get("start", 0), node.attributes.get("end")
    return walk.of(node, 0)[slice(*whole)]


def _pad(walk: Shapes, node: OnnxNode) -> list[Shape]:
    x = walk.of(node, 0)
    pads = node.attributes.get("pads") or _told(walk.numbers(node, 1))
    if len(pads) != 2 * len(x):
        raise ValueError
    return [tuple(s + pads[i] + pads[i + len(x)] for i, s in enumerate(x))]


def _first_only(walk: Shapes, node: OnnxNode) -> list[Shape]:
    """Of fused attention and its like: the output of the model has the shape of the query."""
    return [walk.of(node, 0)]


def _attention(walk: Shapes, node: OnnxNode) -> list[Shape]:
    """com.microsoft.Attention: one table makes query, key and value."""
    return [(*walk.of(node, 0)[:2], walk.of(node, 1)[1] // 3)]


def _told(numbers: tuple[int, ...] | None) -> tuple[int, ...]:
    if numbers is None:
        raise KeyError
    return numbers


# The first output, and others, have the shape of the first input.
_SAME_SHAPE = """
Relu LeakyRelu PRelu Elu Selu Clip Sigmoid HardSigmoid HardSwish Tanh Erf Exp Log Sqrt
Reciprocal Neg Abs Floor Ceil Round Sign Not IsNaN Cast Identity Dropout Softmax LogSoftmax
Softplus Softsign Mish Gelu FastGelu QuickGelu BiasGelu LayerNormalization InstanceNormalization
GroupNormalization RMSNormalization SimplifiedLayerNormalization BatchNormalization LRN
QuantizeLinear DequantizeLinear CumSum Sin Cos Trilu ScatterND
ScatterElements
"""
# All inputs are broadcast together.
_BROADCAST = """
Add Sub Mul Div Pow Mod Max Min Sum Mean Where Equal Greater GreaterOrEqual Less LessOrEqual And
Or Xor
"""
_Rule = Callable[[Shapes, OnnxNode], list[Shape]]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        _SAME_SHAPE.split(),
        _same,
    ),
    **dict.fromkeys(
        _BROADCAST.split(),
        _together,
    ),
    **dict.fromkeys(("Conv", "ConvInteger", "FusedConv", "NhwcConv"), _conv),
    "QLinearConv": lambda walk, node: _conv(walk, node, 0, 3),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool", "QLinearAveragePool"), _pool),
    **dict.fromkeys(
        ("GlobalAveragePool", "GlobalMaxPool", "QLinearGlobalAveragePool"), _global_pool
    ),
    **dict.fromkeys(("MatMul", "MatMulInteger", "MatMulIntegerToFloat"), _matmul),
    "DynamicQuantizeMatMul": _matmul,
    "QLinearMatMul": lambda walk, node: _matmul(walk, node, 0, 3),
    "MatMulNBits": _blocks,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd"), _reduce
    ),
    **dict.fromkeys(("ArgMax", "ArgMin"), _arg),
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    **dict.fromkeys(("Gather", "GatherBlockQuantized"), _gather),
    "Expand": _expand,
    "ConstantOfShape": _filled,
    "Range": _range,
    "Shape": _shape,
    "Pad": _pad,
    **dict.fromkeys(
        ("MultiHeadAttention", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
        _first_only,
    ),
    "Attention": _attention,
    "DynamicQuantizeLinear": lambda walk, node: [walk.of(node, 0), (), ()],
}


# The whole numbers that shapes are computed from


def _numbers(walk: Shapes, node: OnnxNode) -> tuple[int, ...] | None:
    """What stands in the first output, where it can be told and is short."""
    compute = _ARITHMETIC.get(node.op_type)
    if node.op_type == "Shape":
        return _cut(walk, node)
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        size = math.prod(walk.shapes[node.outputs[0]])
        each = value.numbers if isinstance(value, OnnxTensor) else (0,)
        return each * size if each is not None and size <= _MAX_KNOWN else None
    given = [walk.numbers(node, index) for index in range(len(node.inputs))]
    if not given or given[0] is None or len(walk.shapes[node.outputs[0]]) > 1:
        return None
    first = given[0]
    if node.op_type in ("Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape"):
        return first
    if node.op_type == "Slice":
        try:
            part = _parts(walk, node, 1)
        except KeyError:
            return None
        return first[part.get(0, slice(None))]
    if any(each is None for each in given):
        return None
    told = [each for each in given if each is not None]
    if node.op_type == "Gather":
        return tuple(first[i] for i in told[1] if -len(first) <= i < len(first))
    if node.op_type == "Concat":
        return tuple(each for part in told for each in part)
    if node.op_type == "Range":
        numbers = range(told[0][0], told[1][0], told[2][0])
        return tuple(numbers) if len(numbers) <= _MAX_KNOWN else None
    if compute is None:
        return None
    length = max(map(len, told))
    try:
        rows = zip(*(each * length if len(each) == 1 else each for each in told), strict=True)
        return tuple(compute(*row) for row in rows)
    except BROKEN:
        return None


def _whole(a: int, b: int) -> int:
    return int(abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)  # rounds towards zero


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _whole,
    "Mod": lambda a, b: a % b,
    "Max": max,
    "Min": min,
    "Equal": lambda a, b: int(a == b),
    "Greater": lambda a, b: int(a > b),
    "Less": lambda a, b: int(a < b),
    "Not": lambda a: int(not a),
    "Neg": lambda a: -a,
    "Where": lambda condition, a, b: a if condition else b,
}
