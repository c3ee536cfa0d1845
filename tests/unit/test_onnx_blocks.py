"""Blocks of 4 bits that are fitted to samples of their inputs, and those that are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.exporters import onnx_blocks
from edgekit.exporters.onnx_graph import Graph

INPUTS, OUTPUTS = 96, 40


def product(weights: Any) -> Any:
    """A ModelProto of one product."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUTPUTS])],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def lost(model: Any, weights: Any, rows: Any) -> float:
    """Of the outputs, as a share of their power."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"], enable_fallback=0
    )
    (found,) = session.run(None, {"x": rows})
    wanted = rows @ weights
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


def feeds(rows: Any) -> list[dict[str, Any]]:
    """Samples of a few rows each."""
    return [{"x": rows[start : start + 16]} for start in range(0, len(rows), 16)]


@pytest.fixture
def case() -> tuple[Any, Any, Any]:
    """Weights, inputs that hang together as those of a network do, and others of their kind."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 1, (INPUTS, OUTPUTS)).astype(np.float32)
    mixed = rng.normal(0, 1, (12, INPUTS)) * np.geomspace(8, 0.1, INPUTS)
    seen, others = (
        (rng.normal(0, 1, (count, 12)) @ mixed + rng.normal(0, 0.1, (count, INPUTS))).astype(
            np.float32
        )
        for count in (400, 200)
    )
    return weights, seen, others


def test_blocks_that_saw_inputs_lose_less_on_others(case: tuple[Any, Any, Any]) -> None:
    weights, seen, others = case
    losses = {}
    for name, samples in (("blind", []), ("fitted", feeds(seen))):
        model = product(weights)
        facts = onnx_blocks.apply(Graph(model), 4, 32, set(), samples)
        assert facts["matrices"] == 1 and facts.get("fitted", 0) == (name == "fitted")
        losses[name] = lost(model, weights, others)
    assert losses["fitted"] < 0.5 * losses["blind"]


@pytest.mark.parametrize("rows", [10, 400])
def test_what_says_nothing_of_others_is_not_fitted_to(
    rows: int, case: tuple[Any, Any, Any]
) -> None:
    weights, seen, _ = case
    # Few rows; or such as have nothing to do with those that are judged by: every fourth.
    strange = seen[:rows].copy()
    strange[::4] = np.random.default_rng(1).normal(0, 1, strange[::4].shape)
    plain, model = product(weights), product(weights)
    onnx_blocks.apply(Graph(plain), 4, 32, set())
    facts = onnx_blocks.apply(Graph(model), 4, 32, set(), feeds(strange))
    assert facts["fitted"] == 0
    assert model.SerializeToString() == plain.SerializeToString()


def test_blocks_of_eight_bits_are_not_fitted(case: tuple[Any, Any, Any]) -> None:
    weights, seen, _ = case
    assert "fitted" not in onnx_blocks.apply(Graph(product(weights)), 8, 32, set(), feeds(seen))
