"""What an ONNX and a TFLite file have in common: sizes, weights and their bits, what a run costs.

Knows both headers; never a weight or an engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekit import onnx_cost, tflite_cost
from edgekit.errors import UnsupportedModelError
from edgekit.formats import onnx, tflite
from edgekit.formats.tflite_names import BITS
from edgekit.vision_cost import VisionCost

# The suffix of a model's file -> the format of its artifact.
FORMATS = {".onnx": "onnx", ".tflite": "tflite"}
_NO_WEIGHTS = ("bool", "string", "resource", "variant")


@dataclass(frozen=True)
class GraphFile:
    """A model's file and those beside it. ``size_bytes`` is that of all; ``least_bits`` that of the
    smallest weights of matrices and kernels; ``weight_bytes`` that of the weights; ``beside`` names
    files in its folder that hold more of them.
    """

    format: str
    producer: str
    size_bytes: int
    parameters: int
    least_bits: int
    weight_bytes: int
    beside: tuple[str, ...]
    header: onnx.OnnxHeader | tflite.TfliteHeader

    @property
    def stands(self) -> str:
        """The kind of its smallest weights, for a file without a manifest."""
        return f"int{self.least_bits}" if self.least_bits <= 8 else f"F{self.least_bits}"

    def cost(self) -> VisionCost:
        """Of one input. Raises UnsupportedModelError or SourceError where it cannot be told."""
        if isinstance(self.header, onnx.OnnxHeader):
            return onnx_cost.cost(self.header).cost
        return tflite_cost.cost(self.header)


def format_of(path: Path) -> str:
    """Raises UnsupportedModelError for a file of another kind."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise UnsupportedModelError(f"{path.name} is neither an ONNX nor a TFLite file") from None


def read(path: Path) -> GraphFile:
    """Raises SourceError, ArtifactError for a broken file, UnsupportedModelError for another."""
    kind = format_of(path)
    return _of_onnx(path) if kind == "onnx" else _of_tflite(path)


def _of_onnx(path: Path) -> GraphFile:
    header = onnx.read(path)
    packed = [int(n.attributes.get("bits", 4)) for n in header.nodes if n.op_type == "MatMulNBits"]
    bits = {name: size for name, size in onnx.DTYPES.values() if name not in _NO_WEIGHTS}
    kinds = [bits.get(t.dtype, 32) for t in header.initializers if len(t.shape) > 1]
    return GraphFile(
        format="onnx",
        producer=header.producer or "ONNX",
        size_bytes=sum((path.parent / name).stat().st_size for name in (path.name, *header.beside)),
        parameters=header.parameters,
        least_bits=min([*packed, *kinds, 32]),
        weight_bytes=sum(tensor.size_bytes for tensor in header.initializers),
        beside=tuple(header.beside),
        header=header,
    )


def _of_tflite(path: Path) -> GraphFile:
    header = tflite.read(path)
    weights = [t for t in header.constants if len(t.shape) > 1 and t.dtype not in _NO_WEIGHTS]
    # Whole numbers without a scale are no weights: axes, paddings.
    kinds = [BITS[t.dtype] for t in weights if t.scales or t.block or t.dtype.startswith("float")]
    return GraphFile(
        format="tflite",
        producer=header.description or "TFLite",
        size_bytes=header.file_size,
        parameters=header.parameters,
        least_bits=min([*kinds, 32]),
        weight_bytes=sum(tensor.size_bytes for tensor in header.constants),
        beside=(),
        header=header,
    )
