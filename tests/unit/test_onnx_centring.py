"""Centring changes no float answer, and lessens what one range for all channels costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_torch
import torch
from onnx import TensorProto, helper, numpy_helper

from edgekit import source as find_source
from edgekit.exporter import no_progress
from edgekit.exporters import (
    onnx_attention,
    onnx_centring,
    onnx_graph,
    onnx_products,
    passes,
    torch_model,
    torch_to_onnx,
)
from edgekit.exporters.onnx_graph import Graph

_CHANNELS = 32


def _model(*, bias: bool = True, shared: bool = False, norm: bool = False) -> Any:
    """y = z W (+ b), with z = -x, or the layer norm of x; ``shared``: z is an answer of its own."""
    generator = np.random.default_rng(3)
    arrays = {
        "w": generator.standard_normal((_CHANNELS, 16)),
        "b": generator.standard_normal(16),
        "s": generator.uniform(0.5, 20, _CHANNELS),
        "o": 5 * generator.standard_normal(_CHANNELS),
    }
    made = "LayerNormalization" if norm else "Neg"
    nodes = [
        helper.make_node(made, ["x", *(["s", "o"] if norm else [])], ["z"], "first"),
        helper.make_node("MatMul", ["z", "w"], ["p" if bias else "y"], "product"),
    ]
    nodes += [helper.make_node("Add", ["p", "b"], ["y"], "bias")] if bias else []
    outputs = ["y", "r"] if shared else ["y"]
    nodes += [helper.make_node("Abs", ["z"], ["r"])] if shared else []
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", _CHANNELS])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _samples(offset: float = 30.0) -> list[dict[str, Any]]:
    """Every channel lies around a place of its own."""
    generator = np.random.default_rng(0)
    places = offset * generator.standard_normal(_CHANNELS).astype(np.float32)
    spread = np.exp(generator.standard_normal(_CHANNELS)).astype(np.float32)
    return [
        {"x": generator.standard_normal((9, _CHANNELS), np.float32) * spread + places}
        for _ in range(40)
    ]


def _run(model: Any, feed: dict[str, Any]) -> list[Any]:
    found: list[Any] = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    ).run(None, feed)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_the_function_stays_the_same(bias: bool, shared: bool, norm: bool) -> None:
    plain, centred = (_model(bias=bias, shared=shared, norm=norm) for _ in range(2))
    samples = _samples()
    assert onnx_centring.apply(centred, samples, set()) == 1
    kinds = [node.op_type for node in centred.graph.node]
    # A norm that nobody else takes swallows both; elsewhere they are two operators.
    assert ("Mul" in kinds) == (shared or not norm)
    for wanted, found in zip(_run(plain, samples[0]), _run(centred, samples[0]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-3)


def test_what_is_kept_stays() -> None:
    model = _model()
    before = model.SerializeToString()
    assert onnx_centring.apply(model, _samples(), {"product"}) == 0
    assert onnx_centring.apply(model, [], set()) == 0
    assert model.SerializeToString() == before


def test_places_of_channels_cost_less_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, errors = _samples(), []
    wanted = _run(_model(), samples[-1])[0]
    for centred in (False, True):
        with monkeypatch.context() as patch:
            if not centred:
                patch.setattr(onnx_centring, "apply", lambda *_: 0)
            model, facts = onnx_products.apply(_model(), samples, set(), no_progress)
        assert (facts["static_inputs"], facts["centred"]) == (1, int(centred))
        errors.append(float(np.abs(_run(model, samples[-1])[0] - wanted).mean()))
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_attention_is_balanced_and_its_values_take_centres(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = getattr(tiny_torch, f"{family}_folder")(tmp_path / "model")
    traced = torch_model.build(find_source(folder))
    torch_to_onnx.write(traced, tmp_path / "m.onnx")
    generator = np.random.default_rng(0)
    if family == "vit":
        feeds = [{"pixel_values": generator.random((1, 3, 32, 32), np.float32)} for _ in range(4)]
    else:
        ids = [generator.integers(4, 100, (1, 11)) for _ in range(4)]
        feeds = [
            {"input_ids": i, "attention_mask": np.ones_like(i), "token_type_ids": 0 * i}
            for i in ids
        ]
    model = onnx_graph.load(tmp_path / "m.onnx")
    wanted = _run(model, feeds[-1])[0]
    passes.apply("identities", model)
    projections = list(onnx_attention.values(Graph(model)).values())
    assert len(projections) == 2
    for value in projections:
        found = onnx_attention.projection(Graph(model), value)
        assert found is not None and found.added.output[0] == value
    assert onnx_attention.balance(model, feeds) == 2
    assert onnx_centring.apply(model, feeds, set()) >= 2
    np.testing.assert_allclose(_run(model, feeds[-1])[0], wanted, atol=1e-4)
