"""What one input costs in an ONNX graph: arithmetic, activations and weights, from its header.

Knows which operators compute, and how much; never a weight, a machine or an engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.formats.foreign import shown
from edgekit.formats.onnx import OnnxHeader, OnnxNode, OnnxTensor
from edgekit.onnx_shapes import BROKEN, Shape, Shapes, called
from edgekit.vision_cost import VisionCost

# What a size that the file leaves open is taken for: by the rank of the input.
_SIDE, _CHANNELS = 224, 3
_LENGTHS = (128, 32, 8)  # of texts: the longest that the model's table of positions takes
_MAX_SIZE = 1 << 20
# They rename, cut or copy; engines do not compute there, and mostly move nothing.
_FREE = """
Constant Identity Cast Shape Reshape Flatten Squeeze Unsqueeze Gather Slice Concat Split Expand
Range ConstantOfShape Where Equal Dropout
"""
# Engines compute these together with what came before.
_FUSED = """
Relu Clip Sigmoid HardSigmoid HardSwish Tanh Add Mul Div Sub Pow Erf Sqrt BatchNormalization
Gelu FastGelu QuickGelu BiasGelu QuantizeLinear DequantizeLinear DynamicQuantizeLinear Transpose
Neg And Not
"""


@dataclass(frozen=True)
class OnnxCost:
    """``cost`` of one input; ``weight_bytes`` by dtype; ``assumed`` says, as "name size", what
    open sizes of the inputs were taken for.
    """

    cost: VisionCost
    weight_bytes: Mapping[str, int]
    assumed: tuple[str, ...]

    @property
    def is_int8(self) -> bool:
        """Whether most weights have 8 bits."""
        narrow = sum(size for dtype, size in self.weight_bytes.items() if dtype.endswith("int8"))
        return 2 * narrow > sum(self.weight_bytes.values())


def cost(header: OnnxHeader) -> OnnxCost:
    """The cost of a batch of one.

    Raises UnsupportedModelError for an operator whose shapes cannot be told, SourceError for a
    graph that contradicts itself.
    """
    walk, assumed = _walk(header)
    weights = [*header.initializers, *_constants(header)]
    constant = {tensor.name for tensor in header.initializers}
    macs = activations = peak = 0.0
    free, fused = set(_FREE.split()), set(_FUSED.split())
    operators = 0
    for node in header.nodes:
        if node.op_type == "Constant":
            constant.update(node.outputs)
            continue
        if set(filter(None, node.inputs)) <= constant and node.inputs:
            constant.update(node.outputs)  # engines fold it when they load the file
            continue
        try:
            done = _macs(walk, node)
        except BROKEN:
            raise SourceError(f"{called(node)} and its inputs do not fit together") from None
        macs += done
        out = sum(math.prod(walk.shapes.get(name, ())) for name in node.outputs[:1])
        if node.op_type not in free and (done or node.op_type not in fused):
            activations += out
            operators += 1
            read = sum(math.prod(walk.shapes.get(i, ())) for i in node.inputs if i not in constant)
            peak = max(peak, out + read)
    by_type: dict[str, int] = {}
    for tensor in weights:
        by_type[tensor.dtype] = by_type.get(tensor.dtype, 0) + tensor.size_bytes
    count = sum(tensor.elements for tensor in weights)
    return OnnxCost(VisionCost(2 * macs, activations, count, peak, operators), by_type, assumed)


def _walk(header: OnnxHeader) -> tuple[Shapes, tuple[str, ...]]:
    for length in _LENGTHS[:-1]:
        given, assumed = inputs(header, length)
        try:
            return Shapes(header, given), assumed
        except UnsupportedModelError:
            if not assumed:
                raise
    given, assumed = inputs(header, _LENGTHS[-1])
    return Shapes(header, given), assumed


def inputs(header: OnnxHeader, length: int) -> tuple[dict[str, Shape], tuple[str, ...]]:
    """Every input's shape, and what was assumed: a batch of one, texts of ``length`` tokens, images
    of the usual size.
    """
    found: dict[str, Shape] = {}
    assumed: dict[str, int] = {}
    weights = {tensor.name for tensor in header.initializers}
    for value in header.inputs:
        if value.name in weights:  # files of before IR version 4 list them here too
            continue
        sizes: list[int] = []
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int):
                size = _open(axis, len(value.shape), length)
                named = value.shape[axis]
                label = shown(str(named)) if named else f"axis {axis} of {shown(value.name)}"
                assumed[label] = size
            if size > _MAX_SIZE:
                raise SourceError(f"input {shown(value.name)} has a size of {size}")
            sizes.append(size)
        found[value.name] = tuple(sizes)
    return found, tuple(f"{name} {size}" for name, size in assumed.items())


def _open(axis: int, rank: int, length: int) -> int:
    if axis == 0:
        return 1
    if rank == 4:
        return _CHANNELS if axis == 1 else _SIDE
    return length


def _constants(header: OnnxHeader) -> list[OnnxTensor]:
    values = (node.attributes.get("value") for node in header.nodes if node.op_type == "Constant")
    return [value for value in values if isinstance(value, OnnxTensor)]


def _macs(walk: Shapes, node: OnnxNode) -> float:
    """Multiplications with addition of one operator."""
    out = math.prod(walk.shapes.get(node.outputs[0], ())) if node.outputs else 0
    match node.op_type:
        case "Conv" | "ConvInteger" | "FusedConv" | "NhwcConv":
            return out * math.prod(walk.of(node, 1)[1:])
        case "QLinearConv":
            return out * math.prod(walk.of(node, 3)[1:])
        case "MatMul" | "MatMulInteger" | "MatMulIntegerToFloat" | "DynamicQuantizeMatMul":
            return out * walk.of(node, 0)[-1]
        case "QLinearMatMul":
            return out * walk.of(node, 0)[-1]
        case "MatMulNBits":
            return out * walk.of(node, 0)[-1]
        case "Gemm":
            return out * walk.of(node, 0)[0 if node.attributes.get("transA") else -1]
        case "MultiHeadAttention":  # scores and their sum, for every pair of places
            query = walk.of(node, 0)
            keys = walk.of(node, 1)[1] if walk.has(node, 1) else query[1]
            return 2 * out * keys
        case "Attention":
            x = walk.of(node, 0)
            return x[0] * x[1] * math.prod(walk.of(node, 1)) + 2 * out * x[1]
    return 0
