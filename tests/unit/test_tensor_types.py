"""The plan's types are those of llama.cpp's quantizer: compared with the quantizer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import planned_gguf
import pytest

from edgekit.errors import RecipeError
from edgekit.exporters import quantizer
from edgekit.formats import gguf
from edgekit.quant import NEEDS_IMATRIX
from edgekit.tensor_types import retyped

TYPES = [
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S", "IQ4_NL", "IQ4_XS", "IQ3_M", "IQ3_S"),
    *("IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "F16"),
]
# What decides: rows that blocks of 256 fit, heads that share keys, an output of its own, experts.
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "each head its own": {"num_key_value_heads": 8},
    "tied": {"tie_word_embeddings": True},
    "fused": {"model_type": "phi3", "num_key_value_heads": 8},
    "experts": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
}


def _agrees(path: Path, name: str, imatrix: bool) -> None:
    real = {r.name: r.type for r in quantizer.plan(path, name, imatrix=imatrix, overrides=())}
    ours = retyped(gguf.read(path), name, imatrix=imatrix)
    assert {t.name: t.type for t in ours.tensors if t.name in real} == real, name


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M", "IQ3_XXS"])
def test_smollm2_gets_the_types_of_the_quantizer(smollm2_gguf: Path, name: str) -> None:
    """Its rows of 576 fall back where blocks of 256 do not fit."""
    _agrees(smollm2_gguf, name, True)


@pytest.mark.parametrize("shape", ["grouped"])
@pytest.mark.parametrize("name", ["Q4_K_M", "Q3_K_M", "Q2_K"])
def test_a_common_model_gets_the_types_of_the_quantizer(
    shape: str, name: str, tmp_path: Path
) -> None:
    path = planned_gguf.write(planned_gguf.header(**SHAPES[shape]), tmp_path / "m.gguf")
    _agrees(path, name, True)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_every_type_of_every_shape_is_the_quantizer_s(shape: str, tmp_path: Path) -> None:
    path = planned_gguf.write(planned_gguf.header(**SHAPES[shape]), tmp_path / "m.gguf")
    for name in TYPES:
        for imatrix in (True, False):
            if imatrix or name not in NEEDS_IMATRIX:
                _agrees(path, name, imatrix)


def test_sizes_follow_the_types(tmp_path: Path) -> None:
    header = planned_gguf.header()
    smaller = retyped(header, "Q4_K_M")
    assert smaller.file_size < header.file_size / 3
    assert smaller.parameters == header.parameters
    assert retyped(smaller, "F16").tensors == header.tensors


def test_an_unknown_type_is_told_from_a_near_one() -> None:
    with pytest.raises(RecipeError) as caught:
        retyped(planned_gguf.header(), "Q4_K_X")
    assert caught.value.hint == "did you mean 'Q4_K_S'?" or "Q4_K" in str(caught.value.hint)
