"""What the header of a language model says, whatever its format, in the words of a GGUF's.

Knows how edgekit names the constants of its ONNX graphs (exporters/lm_graph.py); never a weight.
Costs, plans and benches look at a model through this, so they are the same for every format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekit import language_model
from edgekit.errors import CorruptArtifactError
from edgekit.formats import gguf, onnx
from edgekit.formats.foreign import shown
from edgekit.formats.gguf import DEFAULT_ALIGNMENT, GgufHeader, GgufTensor
from edgekit.formats.onnx import OnnxHeader, OnnxNode

_PARTS = {"qkv": "attn_qkv", "output": "attn_output", "gate_up": "ffn_up", "down": "ffn_down"}
_ENDS = {"embedding": "token_embd.weight", "head": "output.weight"}
_FLOATS = {"float32": "F32", "float16": "F16"}
_MAX_SIZE = 1 << 31


def is_onnx(path: Path) -> bool:
    """Whether ``path`` is the ONNX file of a language model."""
    return path.suffix.lower() == ".onnx" and language_model.is_one(path)


def read(path: Path, *, whole: bool = True) -> GgufHeader:
    """The header of a GGUF file; of an ONNX file the one that the same model would have as a GGUF,
    with the sizes that its parts have here. Blocks of n bits have the types ``wi4b32`` and so on.

    ``whole`` False: weights may be missing. Raises what the readers of both formats raise.
    """
    if not is_onnx(path):
        return gguf.read(path, whole=whole)
    found = onnx.read(path, whole=whole)
    facts = language_model.beside(path)
    attention = [node for node in found.nodes if node.op_type == "GroupQueryAttention"]
    tensors = _tensors(found, facts.vocab_size, facts.width)
    windows = [_number(node, "local_window_size", 0) for node in attention]
    inner = [each.shape[0] for each in tensors if each.name.endswith("ffn_down.weight")]
    sizes: dict[str, Any] = {
        "block_count": facts.layers,
        "context_length": facts.context_length,
        "embedding_length": facts.width,
        "feed_forward_length": max(inner, default=0),
        "attention.head_count": _number(attention[0], "num_heads", 0) if attention else 0,
        "attention.head_count_kv": facts.kv_heads,
        "attention.key_length": facts.head_dim,
        "attention.value_length": facts.head_dim,
    }
    if any(windows):
        sizes["attention.sliding_window"] = max(windows)
        sizes["attention.sliding_window_pattern"] = [window > 0 for window in windows]
    family = facts.family or "onnx"
    metadata = {f"{family}.{key}": value for key, value in sizes.items()}
    beside = sum(tensor.size_bytes for tensor in found.initializers if tensor.external)
    return GgufHeader(
        version=3,
        metadata={"general.architecture": family, **metadata},
        tensors=tuple(tensors),
        alignment=DEFAULT_ALIGNMENT,
        data_offset=0,
        file_size=found.file_size + beside,
    )


def _tensors(header: OnnxHeader, vocabulary: int, width: int) -> list[GgufTensor]:
    products = _readers(header, "MatMulNBits", 1)
    tables = _readers(header, "GatherBlockQuantized", 0)
    sizes = {tensor.name: tensor.size_bytes for tensor in header.initializers}
    found = []
    for tensor in header.initializers:
        stem, _, suffix = tensor.name.rpartition(".")
        shape, kind, size = tensor.shape, _FLOATS.get(tensor.dtype, tensor.dtype), tensor.size_bytes
        if tensor.name == "embedding":
            stem, suffix = tensor.name, ""
        elif suffix == "blocks":
            size += sum(sizes.get(f"{stem}.{beside}", 0) for beside in ("scales", "zeros"))
            node = products.get(stem) or tables.get(stem)
            if node is None:
                raise CorruptArtifactError(f"nothing reads the blocks of {shown(stem)}")
            shape = (vocabulary, width)
            if stem in products:
                shape = (_number(node, "N"), _number(node, "K"))
            kind = f"wi{_number(node, 'bits')}b{_number(node, 'block_size')}"
        elif suffix == "weight":
            shape = tensor.shape[::-1]  # stored as the product reads it
        elif suffix not in ("gain", "shift", "bias"):
            continue  # tables of the graph's own
        name = tensor.name if suffix in ("gain", "shift", "bias") else _called(stem)
        found.append(GgufTensor(name, shape[::-1], kind, 0, size))
    return found


def _readers(header: OnnxHeader, operator: str, blocks: int) -> dict[str, OnnxNode]:
    """The operators that read blocks as their input number ``blocks``, by what is stored there."""
    return {
        node.inputs[blocks].removesuffix(".blocks"): node
        for node in header.nodes
        if node.op_type == operator and len(node.inputs) > blocks
    }


def _called(stem: str) -> str:
    """``0.qkv`` -> ``blk.0.attn_qkv.weight``."""
    layer, _, part = stem.partition(".")
    if stem in _ENDS:
        return _ENDS[stem]
    return f"blk.{layer}.{_PARTS.get(part, part)}.weight"


def _number(node: OnnxNode, name: str, default: int | None = None) -> int:
    value = node.attributes.get(name, default)
    if type(value) is not int or not 0 <= value <= _MAX_SIZE:
        raise CorruptArtifactError(f"{shown(node.name)} has no sane '{name}'")
    return value
