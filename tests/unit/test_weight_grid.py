"""Weights on a grid are found to be, stored in 4 bits as they are, and never put on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import RecipeError
from edgekit.exporters import onnx_grid, weight_grid
from edgekit.exporters.onnx_graph import Graph, save

RANGES = {4: (-8, 7), 3: (-4, 3), 2: (-2, 1)}


def on_grid(outputs: int, inputs: int, bits: int, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    low, high = RANGES[bits]
    levels = random.integers(low, high + 1, (outputs, inputs))
    steps = np.exp(random.normal(-4, 1, (outputs, 1))).astype(np.float32)
    return (levels * steps).astype(np.float32)


@pytest.mark.parametrize("bits", RANGES)
@pytest.mark.parametrize("inputs", [5, 96, 1000])
def test_levels_and_steps_give_the_weights_back(bits: int, inputs: int) -> None:
    weights = on_grid(300, inputs, bits)
    levels, steps = weight_grid.of_rows(weights)
    assert levels.min() >= -8 and levels.max() <= 7
    np.testing.assert_allclose(levels * steps[:, None], weights, rtol=1e-6)


def test_rows_of_zeros_and_of_one_value_are_on_a_grid() -> None:
    weights = np.zeros((3, 8), np.float32)
    weights[1, 4] = -0.3
    weights[2] = 0.7
    levels, steps = weight_grid.of_rows(weights)
    np.testing.assert_array_equal(levels * steps[:, None], weights)


def test_one_row_between_the_levels_is_enough_to_refuse() -> None:
    weights = on_grid(40, 64, 4)
    weights[17, 3] *= 1.01
    assert weight_grid.of_rows(weights) is None
    assert weight_grid.of_rows(np.random.default_rng(0).normal(size=(4, 64))) is None


def test_more_than_sixteen_levels_are_refused() -> None:
    row = np.arange(-8, 9, dtype=np.float32)[None]  # 8 is one level too many
    assert weight_grid.of_rows(row) is None
    assert weight_grid.of_rows(row[:, :-1]) is not None


def model(*weights: Any) -> Any:
    """Products of the matrices [outputs, inputs], one after the other; the last is a Gemm."""
    nodes, constants, value = [], [], "x"
    for number, weight in enumerate(weights):
        last = number == len(weights) - 1
        constants.append(numpy_helper.from_array(weight if last else weight.T.copy(), f"w{number}"))
        if last:
            constants.append(numpy_helper.from_array(np.ones(len(weight), np.float32), "bias"))
            ends = [value, f"w{number}", "bias"], ["y"]
            nodes.append(helper.make_node("Gemm", *ends, f"n{number}", transB=1))
        else:
            nodes.append(
                helper.make_node("MatMul", [value, f"w{number}"], [f"p{number}"], f"n{number}")
            )
            value = f"p{number}"
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weights[0].shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", len(weights[-1])])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def answer(model: Any, x: Any) -> Any:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("inputs", [16, 96, 192, 200, 512])
def test_products_in_4_bits_answer_as_in_float_and_are_an_eighth_on_disk(
    tmp_path: Path, inputs: int
) -> None:
    whole = model(on_grid(256, inputs, 4), on_grid(256, 256, 3, seed=1))
    x = np.random.default_rng(2).normal(size=(49, inputs)).astype(np.float32)
    wanted = answer(whole, x)
    save(whole, tmp_path / "float.onnx")
    assert onnx_grid.apply(Graph(whole), set()) == {"matrices": 2, "kept_float": []}
    save(whole, tmp_path / "four.onnx")
    np.testing.assert_allclose(
        answer(whole, x), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max()
    )
    weights = 256 * inputs + 256 * 256
    # Half a byte a weight, at most a byte more for padding and steps, and what a graph has anyway.
    assert (tmp_path / "four.onnx").stat().st_size < 0.5 * weights + 256 * 2 * 40 + 3000
    assert (tmp_path / "float.onnx").stat().st_size > 4 * weights


def test_a_matrix_between_the_levels_stays_float_and_is_named() -> None:
    whole = model(
        np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32), on_grid(8, 32, 4)
    )
    assert onnx_grid.apply(Graph(whole), set()) == {"matrices": 1, "kept_float": ["n0"]}


def test_a_model_without_a_grid_is_refused_with_a_way_out() -> None:
    whole = model(np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32))
    with pytest.raises(RecipeError) as caught:
        onnx_grid.apply(Graph(whole), set())
    assert "vit-qat" in str(caught.value.hint)
