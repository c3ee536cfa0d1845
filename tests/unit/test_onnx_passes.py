"""A pass fires where it should, leaves alone what is something else, and changes no answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny_torch
import torch

from edgekit import source as find_source
from edgekit.exporters import onnx_graph, passes, torch_model, torch_to_onnx
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


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_every_layer_of_a_family_is_fused_and_answers_the_same(family: str, tmp_path: Path) -> None:
    folder = getattr(tiny_torch, f"{family}_folder")(tmp_path / "model")
    fired, plain, fused = _fused(torch_model.build(find_source(folder)), tmp_path)
    assert fired["attention"] == 2
    if family == "vit":
        feeds = {"pixel_values": np.random.default_rng(0).random((3, 3, 32, 32), np.float32)}
    else:
        ids = np.random.default_rng(0).integers(4, 100, (2, 11))
        mask = np.ones_like(ids)
        mask[1, 6:] = 0  # a shorter text beside a longer one
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}
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
