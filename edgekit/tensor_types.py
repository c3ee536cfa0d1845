"""Which type each tensor gets in a GGUF file of a type: llama.cpp's mixtures, without llama.cpp.

Knows names, shapes and types; never a weight, an engine or a file.

Facts: ``src/llama-quant.cpp`` of https://github.com/ggml-org/llama.cpp. A test compares this with
the quantizer itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from edgekit.formats.ggml_types import TYPES
from edgekit.formats.gguf import GgufHeader, GgufTensor
from edgekit.quant import FLOAT_TYPES, gguf_type

_KINDS = {kind.name: kind for kind in TYPES.values()}
_BASES = {
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q2_K_S": "Q2_K",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "MXFP4_MOE": "MXFP4",
}
# What steps in for a type whose blocks do not fit a tensor's rows.
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"} | dict.fromkeys(
    ("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"
)
_SMALL = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
_MIDDLE = ("IQ2_S", "IQ2_M")
# Matrices that stay as they are.
_KEPT = ("ffn_gate_inp.", "position_embd.", "token_types.", "ssm_conv1d", "shortconv.conv.")
_ROLES = (
    ("attn_qkv.weight", "v"),
    ("attn_kv_b.weight", "v"),
    ("attn_v.weight", "v"),
    ("attn_k.weight", "k"),
    ("attn_q.weight", "q"),
    ("attn_output.weight", "attention output"),
    ("ffn_up", "up or gate"),
    ("ffn_gate", "up or gate"),
    ("ffn_down", "down"),
)


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands: its layer of ``layers``, of which ``grouped`` share keys by four."""

    layer: int
    layers: int
    grouped: bool
    experts: int
    imatrix: bool

    @property
    def first_eighth(self) -> bool:
        return self.layer < self.layers // 8

    @property
    def favoured(self) -> bool:
        """The layers that get more bits: the first and last eighth, and every third between."""
        eighth = self.layers // 8
        return (
            self.first_eighth
            or self.layer >= 7 * self.layers // 8
            or (self.layer - eighth) % 3 == 2
        )


def retyped(header: GgufHeader, file_type: str, *, imatrix: bool = True) -> GgufHeader:
    """The header that ``header`` would have if its model were quantized to ``file_type``.

    ``imatrix``: with an importance matrix, which changes a few choices. Offsets are not kept.
    Raises RecipeError for an unknown type.
    """
    file_type = gguf_type(file_type)
    tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    tensors = tuple(
        _with_type(tensor, _type(tensor, file_type, header, tied, imatrix))
        for tensor in header.tensors
    )
    size = header.data_offset + sum(
        -(-tensor.size_bytes // header.alignment) * header.alignment for tensor in tensors
    )
    return replace(header, tensors=tensors, file_size=size)


def _with_type(tensor: GgufTensor, kind: str) -> GgufTensor:
    return replace(tensor, type=kind, size_bytes=_KINDS[kind].size_bytes(tensor.elements))


def _type(tensor: GgufTensor, file_type: str, header: GgufHeader, tied: bool, imatrix: bool) -> str:
    name = tensor.name
    if (
        len(tensor.shape) < 2
        or not name.endswith("weight")
        or name.endswith("_norm.weight")
        or any(kept in name for kept in _KEPT)
    ):
        return tensor.type
    if file_type in FLOAT_TYPES:
        return file_type
    base = _BASES.get(file_type, file_type)
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        kind = _output(tensor, file_type, base)
    elif name in ("token_embd.weight", "per_layer_token_embd.weight"):
        kind = "Q8_0" if file_type == "MXFP4_MOE" else _embedding(file_type, base)
    elif file_type == "MXFP4_MOE":
        kind = "MXFP4" if len(tensor.shape) > 2 else "Q8_0"
    else:
        role = next((role for part, role in _ROLES if part in name), "other")
        kind = _inner(role, name, file_type, base, _place(header, name, imatrix))
    return _fitting(tensor, kind)


def _place(header: GgufHeader, name: str, imatrix: bool) -> _Place:
    def number(key: str) -> int:
        value = header.metadata.get(f"{header.architecture}.{key}", 0)
        if isinstance(value, list):
            value = max((x for x in value if isinstance(x, int)), default=0)
        return value if isinstance(value, int) else 0

    found = re.match(r"blk\.(\d+)\.", name, re.ASCII)
    heads = number("attention.head_count")
    shared = number("attention.head_count_kv") or heads
    return _Place(
        layer=int(found[1]) if found else 0,
        layers=number("block_count"),
        grouped=bool(shared) and heads // shared >= 4,
        experts=number("expert_count"),
        imatrix=imatrix,
    )


def _fitting(tensor: GgufTensor, kind: str) -> str:
    """``kind``, or what steps in where its blocks do not fit the rows."""
    row = tensor.shape[0]
    if row % _KINDS[kind].block_size:
        kind = "IQ4_NL" if kind.startswith("IQ") else _FALLBACKS.get(kind, kind)
    return "F16" if row % _KINDS[kind].block_size else kind


def _output(tensor: GgufTensor, file_type: str, base: str) -> str:
    if file_type == "MXFP4_MOE" or tensor.shape[0] % _KINDS[base].block_size:
        return "Q8_0"
    if file_type in (*_SMALL, "IQ3_XXS"):
        return "Q5_K"
    return base if base == "Q8_0" else "Q6_K"


def _embedding(file_type: str, base: str) -> str:
    if file_type in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
        return "Q2_K"
    if file_type in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "IQ3_S"
    return "Q4_K" if file_type in ("TQ1_0", "TQ2_0", "Q2_0") else base


def _inner(role: str, name: str, file_type: str, base: str, at: _Place) -> str:
    if file_type in _SMALL:
        return _of_small(role, file_type, base, at)
    if role == "v":
        kind = _value(file_type, at) or base
        if at.layers == 80 and kind in ("Q3_K", "Q4_K"):  # the 70B models
            kind = "Q5_K"
        return "Q8_0" if at.experts == 8 else kind
    if role == "k" and at.experts == 8:
        return "Q8_0"
    if role in ("k", "q"):
        return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(file_type, base)
    if role == "down":
        return _down(file_type, at) or base
    if role == "attention output":
        return _attention_output(file_type, at) or base
    if role == "up or gate" and file_type == "IQ3_XS":
        middle = at.layers // 8 <= at.layer < 7 * at.layers // 8
        return "IQ3_XXS" if middle else base
    return base


def _of_small(role: str, file_type: str, base: str, at: _Place) -> str:
    """Types of about two bits: more of them for what hurts most."""
    more = "IQ3_S" if file_type in _MIDDLE else "Q2_K"
    if role == "v":
        return "Q4_K" if at.grouped or at.experts >= 4 else more
    if role == "k" and at.experts == 8:
        return "Q4_K"
    if role == "down" and at.first_eighth:
        return more
    if role == "attention output":
        if at.experts == 8:
            return "Q5_K"
        if file_type in ("IQ1_S", "IQ1_M"):
            return "IQ2_XXS"
        return "IQ3_S" if file_type in _MIDDLE else base
    return base


def _value(file_type: str, at: _Place) -> str | None:
    """The matrix of the values, or the one that holds queries, keys and values."""
    match file_type:
        case "Q2_K":
            return "Q4_K" if at.grouped else "Q3_K"
        case "Q2_K_S" | "IQ3_XS" | "IQ3_S":
            return "Q4_K" if at.grouped else None
        case "IQ3_XXS":
            return "Q4_K" if at.grouped else None if at.imatrix else "IQ3_S"
        case "IQ3_M":
            return "Q4_K"
        case "Q3_K_M":
            return "Q5_K" if at.layer < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if at.grouped else None
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if at.favoured else None
        case "Q4_K_S":
            return "Q5_K" if at.layer < 4 else None
    return None


def _down(file_type: str, at: _Place) -> str | None:
    match file_type:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S":
            return "Q4_K" if at.first_eighth else None
        case "IQ3_XXS" if not at.imatrix:
            return "Q4_K" if at.first_eighth else "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if at.layer < at.layers // 16 else "Q4_K"
        case "IQ3_M":
            more = at.first_eighth or (at.experts == 8 and at.favoured)
            return "Q4_K" if more else None
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if at.favoured else None
        case "IQ4_NL" | "IQ4_XS" if not at.imatrix:
            return "Q5_K" if at.first_eighth else None
        case "Q4_K_S":
            return "Q5_K" if at.first_eighth else None
        case "Q4_0" | "Q5_0" if at.imatrix and at.first_eighth:
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[file_type]
    return None


def _attention_output(file_type: str, at: _Place) -> str | None:
    if at.experts == 8:
        more = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ3_XS", "IQ3_XXS")
        return "Q5_K" if file_type in (*more, "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS") else None
    return {
        "Q2_K": "Q3_K",
        "IQ3_XXS": "IQ3_S",
        "Q3_K_M": "Q4_K",
        "Q3_K_L": "Q5_K",
        "IQ3_M": "Q4_K",
    }.get(file_type)
