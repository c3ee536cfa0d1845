"""What a config.json tells is what an export writes: the same matrices, the same facts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from edgekit import model_cost
from edgekit.formats import gguf
from edgekit.model_shape import header_of

# The others are built by other tests of this folder too, but not always on the same core.
ALWAYS = ("llama3", "phi3", "gemma3")


@pytest.mark.parametrize(
    "name",
    [
        name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow)
        for name in tiny.MODELS
    ],
)
def test_the_told_shapes_are_the_exported_ones(
    name: str, tiny_model: Callable[[str], Path], tiny_gguf: Callable[[str], Path]
) -> None:
    told = header_of(json.loads((tiny_model(name) / "config.json").read_text()))
    real = gguf.read(tiny_gguf(name))
    assert told.architecture == real.architecture
    assert _matrices(told) == _matrices(real)
    assert model_cost.cost(told).layers == model_cost.cost(real).layers


def _matrices(header: gguf.GgufHeader) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tensor.shape for tensor in header.tensors if len(tensor.shape) > 1}
