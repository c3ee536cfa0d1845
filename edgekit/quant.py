"""The one table of precisions: what a number of bits means in each format.

Knows names and numbers only; never touches weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgekit.errors import RecipeError
from edgekit.registry import did_you_mean

# name -> llama_ftype of llama.cpp's include/llama.h: every type its quantizer offers.
GGUF_FTYPES: dict[str, int] = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q5_K_S": 16,
    "Q5_1": 9,
    "Q5_0": 8,
    "Q4_K_M": 15,
    "Q4_K_S": 14,
    "Q4_1": 3,
    "Q4_0": 2,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "Q3_K_L": 13,
    "Q3_K_M": 12,
    "Q3_K_S": 11,
    "IQ3_M": 27,
    "IQ3_S": 26,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "Q2_K": 10,
    "Q2_K_S": 21,
    "Q2_0": 41,
    "IQ2_M": 29,
    "IQ2_S": 28,
    "IQ2_XS": 20,
    "IQ2_XXS": 19,
    "TQ2_0": 37,
    "TQ1_0": 36,
    "IQ1_M": 31,
    "IQ1_S": 24,
    "Q1_0": 40,
    "MXFP4_MOE": 38,
}

# llama.cpp's own short forms.
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

FLOAT_TYPES = ("F32", "F16", "BF16")

# The quantizer refuses these without an importance matrix.
NEEDS_IMATRIX = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M", "Q2_K_S", "IQ3_XXS")


@dataclass(frozen=True)
class GgufPreset:
    """What ``--bits`` picks: a type, and whether an importance matrix is made by default."""

    type: str
    imatrix: bool


# One type a size, as benchmarks/llm/presets.py measures them and their rivals on a fair float
# reference: the one that loses least among those that decode fast. The types that look values up in
# tables (IQ3, IQ2) are smaller for what they lose, and half as fast (docs/benchmarks.md).
GGUF_BITS: dict[int, GgufPreset] = {
    16: GgufPreset("F16", imatrix=False),
    8: GgufPreset("Q8_0", imatrix=False),
    6: GgufPreset("Q6_K", imatrix=True),
    5: GgufPreset("Q5_K_M", imatrix=True),
    4: GgufPreset("Q4_K_M", imatrix=True),
    3: GgufPreset("Q3_K_M", imatrix=True),
    2: GgufPreset("Q2_K", imatrix=True),
}

# What the weights (w) and activations (a) of an ONNX file are; the words are those of the recipes.
ONNX_TYPES = (
    "F32",
    "F16",
    "dynamic_wi8_afp32",
    "static_wi8_ai8",
    "weight_only_wi8_afp32",
    "weight_only_wi8b32",
    "weight_only_wi8b64",
    "weight_only_wi4b32",
    "weight_only_wi4b64",
    "weight_only_wi4_afp32",
)
# Those that a language model is exported to; its activations stay float32 between the products.
ONNX_LANGUAGE_TYPES = (
    "F32",
    "F16",
    "weight_only_wi8b32",
    "weight_only_wi8b64",
    "weight_only_wi4b32",
    "weight_only_wi4b64",
)
_BLOCKS = re.compile(r"weight_only_wi(\d+)b(\d+)")
# The same of a TFLite file: its engine has no blocks of 8 bits.
TFLITE_TYPES = (
    "F32",
    "F16",
    "dynamic_wi8_afp32",
    "static_wi8_ai8",
    "weight_only_wi8_afp32",
    "weight_only_wi4b32",
    "weight_only_wi4_afp32",
    "dynamic_wi4_afp32",
)
# These need inputs to run the model on while it is quantized; others take them, and do better.
NEEDS_SAMPLES = ("static_wi8_ai8",)
TAKES_SAMPLES = (
    *NEEDS_SAMPLES,
    *("dynamic_wi8_afp32", "weight_only_wi4b32", "weight_only_wi4b64"),
)


def check_choice(bits: int | None, type: str | None) -> None:
    """RecipeError where a user gave both: a number of bits stands for one default type."""
    if bits is not None and type is not None:
        raise RecipeError(
            "give --bits or --type, not both", hint="--bits stands for one default type"
        )


def gguf_type(name: str) -> str:
    """The canonical name of a GGUF file type. Raises RecipeError with the closest known name."""
    upper = name.upper()
    upper = _ALIASES.get(upper, upper)
    if upper not in GGUF_FTYPES:
        raise RecipeError(
            f"unknown GGUF type '{name}'", hint=did_you_mean(upper, list(GGUF_FTYPES))
        )
    return upper


def gguf_preset(bits: int) -> GgufPreset:
    """The documented default for ``bits`` per weight. Raises RecipeError for other numbers."""
    if bits not in GGUF_BITS:
        choices = ", ".join(str(b) for b in sorted(GGUF_BITS))
        raise RecipeError(f"no default for {bits} bits", hint=f"choose one of {choices}")
    return GGUF_BITS[bits]


def wants_imatrix(type_name: str) -> bool:
    """Whether an importance matrix pays: at about 6 bits and below it halves the KL divergence."""
    return type_name not in (*FLOAT_TYPES, "Q8_0", "TQ1_0", "TQ2_0", "MXFP4_MOE", "Q1_0", "Q2_0")


def onnx_type(name: str) -> str:
    """The canonical name of a precision in ONNX. Raises RecipeError with the closest known name."""
    return _graph_type("ONNX", ONNX_TYPES, name)


def blocks(type: str) -> tuple[int, int] | None:
    """Bits of a weight, and weights of a block with a scale of its own; None for a type of ONNX or
    TFLite that has no blocks.
    """
    match = _BLOCKS.fullmatch(type)
    return match and (int(match[1]), int(match[2]))


def tflite_type(name: str) -> str:
    """The same in TFLite."""
    return _graph_type("TFLite", TFLITE_TYPES, name)


def _graph_type(format: str, types: tuple[str, ...], name: str) -> str:
    known = {each.lower(): each for each in types}
    if name.lower() not in known:
        raise RecipeError(
            f"unknown {format} type '{name}'", hint=did_you_mean(name.lower(), list(types))
        )
    return known[name.lower()]


def graph_preset(format: str, bits: int, *, convolutional: bool) -> str:
    """The documented default for ``bits`` per weight in a graph of ONNX or TFLite. Raises
    RecipeError for other numbers.

    In 8 bits a network of convolutions is several times slower with dynamic activations than in
    float, and one of matrix products is slower with static ones (docs/onnx.md, docs/tflite.md).
    """
    eight = "static_wi8_ai8" if convolutional else "dynamic_wi8_afp32"
    presets = {32: "F32", 16: "F16", 8: eight, 4: "weight_only_wi4b32"}
    if bits not in presets:
        choices = ", ".join(str(each) for each in sorted(presets))
        raise RecipeError(f"no {format} default for {bits} bits", hint=f"choose one of {choices}")
    return presets[bits]


def onnx_language_preset(bits: int) -> str:
    """The documented default of a language model. Raises RecipeError for other numbers."""
    presets = {32: "F32", 16: "F16", 8: "weight_only_wi8b32", 4: "weight_only_wi4b64"}
    if bits not in presets:
        choices = ", ".join(str(each) for each in sorted(presets))
        raise RecipeError(f"no ONNX default for {bits} bits", hint=f"choose one of {choices}")
    return presets[bits]
