"""What one input costs in a TFLite graph: arithmetic, activations and weights, from its header.

Knows which operators compute, and how much; never a weight, a machine or an engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgekit.errors import SourceError
from edgekit.formats.tflite import TfliteHeader, TfliteOperator, TfliteTensor
from edgekit.vision_cost import VisionCost

_MAX_MACS = 1e15  # of one input: a file that says more lies
# They rename, cut or copy; the engine does not compute there.
_FREE = """
RESHAPE SQUEEZE EXPAND_DIMS SHAPE PACK UNPACK SLICE STRIDED_SLICE GATHER SPLIT CONCATENATION CAST
BROADCAST_TO QUANTIZE DEQUANTIZE
"""


def cost(header: TfliteHeader) -> VisionCost:
    """The cost of one run; an open size counts as one.

    Raises SourceError for a graph that contradicts itself.
    """
    tensors = header.main.tensors
    done = activations = peak = 0.0
    operators, free = 0, set(_FREE.split())
    for operator in header.main.operators:
        given = [tensors[number] for number in operator.inputs if number >= 0]
        made = [tensors[number] for number in operator.outputs]
        if all(tensor.buffer is not None for tensor in given):
            continue  # the engine folds it when it loads the file
        try:
            done += macs(operator, given, made)
        except IndexError:
            raise SourceError(f"{operator.kind} and its inputs do not fit together") from None
        if operator.kind not in free:
            out = sum(tensor.elements for tensor in made)
            read = sum(tensor.elements for tensor in given if tensor.buffer is None)
            activations += out
            peak = max(peak, float(out + read))
            operators += 1
    if max(done, activations) > _MAX_MACS:
        raise SourceError(f"the graph asks for {done:.0e} multiplications an input")
    return VisionCost(2 * done, activations, header.parameters, peak, operators)


def macs(
    operator: TfliteOperator, given: Sequence[TfliteTensor], made: Sequence[TfliteTensor]
) -> float:
    """Multiplications with addition of one operator, by its inputs (without those that are left
    out) and outputs; weights lie as output, height, width, input. IndexError where they do not fit.

    Layouts: https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec.
    """
    match operator.kind:
        case "CONV_2D" | "CONV_3D":
            return made[0].elements * math.prod(_sizes(given[1])[1:])
        case "DEPTHWISE_CONV_2D":  # 1, height, width, channels
            return made[0].elements * math.prod(_sizes(given[1])[1:3])
        case "TRANSPOSE_CONV":  # of the input, which comes third
            return given[2].elements * math.prod(_sizes(given[1])[:-1])
        case "FULLY_CONNECTED":
            return made[0].elements * _sizes(given[1])[-1]
        case "BATCH_MATMUL":
            # Whichever way round it is stored, the first input has the output's rows.
            rows = _sizes(made[0])[-2] * math.prod(_sizes(given[0])[:-2])
            return made[0].elements * given[0].elements / max(1, rows)
    return 0.0


def _sizes(tensor: TfliteTensor) -> tuple[int, ...]:
    return tuple(1 if size is None else size for size in tensor.shape)
