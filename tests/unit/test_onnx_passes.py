"""A pass fires where it should, leaves alone what is something else, and changes no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_torch
import torch

from edgekit import source as find_source
from edgekit import telemetry
from edgekit.errors import RecipeError
from edgekit.exporters import (
    fusion,
    onnx_graph,
    onnx_quantizer,
    passes,
    torch_model,
    torch_to_onnx,
    torch_towers,
)
from edgekit.exporters.torch_model import TracedModel
from edgekit.source import of_module


class Attention(torch.nn.Module):
    """One layer; ``how`` departs from the pattern."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.q, self.k, self.v = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        batch, tokens, width = x.shape
        q, k, v = (
            each(x).view(batch, tokens, 4, 4).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(2, 3) * 0.5
        if self.how == "mask":
            scores = scores + torch.ones(tokens, tokens).tril().log().clamp(min=-1e9)[None, None]
        weights = scores.softmax(-2 if self.how == "other axis" else -1)
        found = (weights @ v).transpose(1, 2).reshape(batch, tokens, width)
        if self.how == "heads swapped":
            found = (weights @ v).reshape(batch, tokens, width)
        return (found, weights) if self.how == "shown" else found


def _traced(how: str) -> TracedModel:
    return torch_model.build(of_module(Attention(how), (torch.randn(1, 5, 16),)))


def _answers(path: Path, feeds: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def _fused(traced: TracedModel, folder: Path) -> tuple[dict[str, int], Path, Path]:
    plain, fused = folder / "plain.onnx", folder / "fused.onnx"
    torch_to_onnx.write(traced, plain)
    model = onnx_graph.load(plain)
    fired = passes.run(model)
    onnx_graph.save(model, fused)
    return fired, plain, fused


@pytest.mark.parametrize("family", ["vit", "bert", "clip"])
def test_every_layer_of_a_family_is_fused_and_answers_the_same(family: str, tmp_path: Path) -> None:
    folder = getattr(tiny_torch, f"{family}_folder")(tmp_path / "model")
    rng = np.random.default_rng(0)
    pixels = {"pixel_values": rng.random((3, 3, 32, 32), np.float32)}
    ids = rng.integers(4, 100, (2, 11))
    ids[:, 7] = 3  # where CLIP's texts end
    mask = np.ones_like(ids)
    mask[1, 6:] = 0  # a shorter text beside a longer one
    words = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}
    found = find_source(folder)
    if family == "clip":
        _, image, text = torch_towers.build(found)
        graphs = [(image, pixels), (text, {"input_ids": ids})]
    else:
        graphs = [(torch_model.build(found), pixels if family == "vit" else words)]
    for traced, feeds in graphs:
        fired, plain, fused = _fused(traced, tmp_path)
        assert (fired["attention"], fired["merged_products"]) == (2, 4)
        assert _answers(fused, feeds) == pytest.approx(_answers(plain, feeds), abs=1e-4)


@pytest.mark.parametrize("how", ["plain", "mask"])
def test_plain_attention_is_fused(how: str, tmp_path: Path) -> None:
    fired, plain, fused = _fused(_traced(how), tmp_path)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 5, 16)).astype(np.float32)}
    assert fired["attention"] == 1
    assert _answers(fused, feeds) == pytest.approx(_answers(plain, feeds), abs=1e-5)


@pytest.mark.parametrize("how", ["other axis", "heads swapped", "shown"])
def test_what_is_not_quite_attention_is_left_alone(how: str, tmp_path: Path) -> None:
    """Another softmax, heads that are not put side by side, weights that somebody wants to see."""
    fired, plain, fused = _fused(_traced(how), tmp_path)
    assert fired["attention"] == 0
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 5, 16)).astype(np.float32)}
    assert _answers(fused, feeds) == pytest.approx(_answers(plain, feeds), abs=1e-6)


class Norms(torch.nn.Module):
    """A layer norm, a factor behind it, and three products of that; ``how`` departs from it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.norm = torch.nn.LayerNorm(16)
        self.norm.weight.data.normal_()
        self.norm.bias.data.normal_()
        self.factors = torch.nn.Parameter(torch.rand(8 if how == "rows" else 16) + 0.5)
        self.parts = torch.nn.ModuleList(
            torch.nn.Linear(16, size, bias=not (how == "one bias" and size == 12))
            for size in (8, 12, 20)
        )

    def forward(self, x: torch.Tensor) -> Any:
        normed = self.norm(x)
        scaled = normed * (self.factors[:, None] if self.how == "rows" else self.factors)
        if self.how == "shown":
            scaled = scaled + normed
        if self.how == "other inputs":
            return tuple(part(scaled * (i + 1)) for i, part in enumerate(self.parts))
        return tuple(part(scaled) for part in self.parts)


def _norms(how: str, folder: Path, kind: str = "F32") -> tuple[Any, list[Any], list[Any]]:
    """How often each pass fired, and all outputs before and after."""
    plain, start = folder / "plain.onnx", folder / "start.onnx"
    torch_to_onnx.write(torch_model.build(of_module(Norms(how), (torch.randn(1, 8, 16),))), plain)
    rng = np.random.default_rng(1)
    feeds = {"x": rng.standard_normal((1, 8, 16)).astype(np.float32)}
    if kind == "F32":
        start = plain
    else:
        onnx_quantizer.quantize(plain, start, kind, samples=[], progress=lambda *_: None)
    model = onnx_graph.load(start)
    sides: list[list[Any]] = []
    fired: dict[str, int] = {}
    for _ in range(2):
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        sides.append(session.run(None, feeds))
        fired = fired or passes.run(model)
    return fired, sides[0], sides[1]


@pytest.mark.parametrize(
    ("how", "kind", "scales", "merged"),
    [
        ("plain", "F32", 1, 2),
        ("plain", "dynamic_wi8_afp32", 1, 2),
        ("plain", "weight_only_wi4b32", 1, 2),
        ("plain", "weight_only_wi8_afp32", 1, 2),
        ("one bias", "F32", 1, 1),  # those with a bias are merged
        ("other inputs", "F32", 1, 0),
        ("shown", "F32", 0, 2),
        ("rows", "F32", 0, 2),  # a factor for each row is none for each channel
    ],
)
def test_scales_are_folded_and_products_merged_where_it_is_the_same(
    how: str, kind: str, scales: int, merged: int, tmp_path: Path
) -> None:
    fired, before, after = _norms(how, tmp_path, kind)
    assert (fired["folded_scales"], fired["merged_products"]) == (scales, merged)
    for one, other in zip(before, after, strict=True):
        # In 8 bits a rounding error may put an activation on the next step.
        assert other == pytest.approx(one, abs=1e-5 if kind != "dynamic_wi8_afp32" else 0.05)


def test_a_pass_that_is_slower_is_dropped_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a pass that makes the graph run a large product in vain, beside the real ones."""
    plain = tmp_path / "plain.onnx"
    torch_to_onnx.write(_traced("plain"), plain)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 5, 16)).astype(np.float32)}

    def burden(graph: onnx_graph.Graph) -> int:
        large = graph.add_constant("large", np.zeros((16, 200_000), np.float32))
        back = graph.add_constant("back", np.zeros((200_000, 16), np.float32))
        last = graph.nodes[-1]
        out, last.output[0] = last.output[0], "before"
        more = [("MatMul", ["before", large], "wide"), ("MatMul", ["wide", back], "nothing")]
        more.append(("Add", ["before", "nothing"], out))
        graph.keep([*graph.nodes, *(onnx.helper.make_node(k, i, [o]) for k, i, o in more)])
        return 1

    model = onnx_graph.load(plain)
    monkeypatch.setitem(passes.PASSES, "burden", burden)
    chosen = fusion.choose([model], [feeds], "auto", lambda *_: None)
    trials = {trial.name: trial for trial in chosen.trials}
    assert not trials["burden"].kept and (trials["burden"].ratio or 0) > 1.02
    assert "burden" not in chosen.recipe and "attention" in chosen.recipe
    assert chosen.fired[0].keys() == set(chosen.recipe.split(","))
    assert not any(node.op_type == "Add" and "nothing" in node.input for node in model.graph.node)
    again = onnx_graph.load(plain)
    repeated = fusion.choose([again], [feeds], chosen.recipe, lambda *_: None)
    assert repeated.trials == () and again.SerializeToString() == model.SerializeToString()
    with pytest.raises(RecipeError):
        fusion.choose([again], [feeds], "attention,burdens", lambda *_: None)


@pytest.mark.parametrize(("others", "remembered"), [(0.0, True), (0.5, False)])
def test_a_race_beside_other_work_is_not_remembered(
    tmp_path: Path, home: Path, others: float, remembered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    strain = telemetry.Strain(others, 0.0, None, None)
    monkeypatch.setattr(telemetry, "strain", lambda *_: strain)
    plain = tmp_path / "plain.onnx"
    torch_to_onnx.write(_traced("plain"), plain)
    feeds = {"x": np.zeros((1, 5, 16), np.float32)}
    found = fusion.choose([onnx_graph.load(plain)], [feeds], "auto", lambda *_: None)
    assert found.trials
    files = list((home / "state" / "fusion").glob("*.json"))
    assert len(files) == (len(found.trials) if remembered else 0)


def test_beside_other_work_chance_is_given_more_room() -> None:
    ratios = [1.03, 1.05, 1.04, 1.06, 1.05, 1.07, 1.04]
    assert fusion.is_slower(ratios, busy=False) and not fusion.is_slower(ratios, busy=True)
    assert fusion.is_slower([3 * each for each in ratios], busy=True)
    assert not fusion.is_slower([each - 0.05 for each in ratios], busy=False)
