"""A recipe is exact: what it does not know, it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from edgekit import quant
from edgekit.errors import RecipeError
from edgekit.recipe import Calibration, Recipe

FULL = Recipe(
    format="gguf",
    type="q4_k",
    calibration=Calibration("builtin", "ab" * 32, 8),
    overrides=(("ffn_down", "Q8_0"),),
    adapter="cd" * 32,
)


def test_a_recipe_survives_json() -> None:
    assert Recipe.from_dict(FULL.to_dict()) == FULL
    assert Recipe.from_dict(FULL.to_dict()).sha256 == FULL.sha256


def test_aliases_become_the_canonical_name() -> None:
    assert FULL.type == "Q4_K_M"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"typo": 1}, "unknown key 'typo'"),
        ({"type": "Q4_K_X"}, "unknown GGUF type"),
        ({"type": 4}, "type must be str"),
        ({"overrides": [["a"]]}, "overrides must be"),
        ({"overrides": [["(", "Q8_0"]]}, "tensor pattern"),
        ({"overrides": [["a" * 300, "Q8_0"]]}, "longer than"),
        ({"adapter_mode": "glue"}, "adapter_mode"),
        ({"type": "F16"}, "overrides need a quantized type"),
        ({"type": "IQ2_XXS", "calibration": None}, "needs an importance matrix"),
        ({"calibration": {"text": "x"}}, "'sha256' is missing"),
        ({"calibration": {"text": "x", "sha256": "y", "chunks": True}}, "chunks must be int"),
    ],
)
def test_what_a_recipe_does_not_know_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(FULL.to_dict() | change)


@pytest.mark.parametrize("body", [None, [], "x", {"format": "gguf"}])
def test_what_is_no_recipe_is_refused(body: Any) -> None:
    with pytest.raises(RecipeError):
        Recipe.from_dict(body)


def test_every_number_of_bits_has_one_known_type() -> None:
    for bits in (2, 3, 4, 5, 6, 8, 16):
        preset = quant.gguf_preset(bits)
        assert preset.type in quant.GGUF_FTYPES
        assert preset.imatrix == (bits <= 6)
    with pytest.raises(RecipeError, match="no default for 7 bits"):
        quant.gguf_preset(7)


def test_ftypes_are_those_of_the_engine() -> None:
    engine = pytest.importorskip("llama_cpp.llama_cpp")
    for name, number in quant.GGUF_FTYPES.items():
        constant = "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"
        assert getattr(engine, constant) == number
