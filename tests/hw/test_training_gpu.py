"""Training on a graphics card gives the same numbers each time. Needs torch with CUDA and a card.

Run with ``pytest -m hw tests/hw``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_data import prose

from edgekit.training import checkpoint
from edgekit.training.recipe import train

pytestmark = pytest.mark.hw


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_two_runs_of_tinyllama_end_with_the_same_bytes(tmp_path: Path, precision: str) -> None:
    """Attention's backward pass among them, which is not repeatable unless one asks for it."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no graphics card")
    (tmp_path / "prose.txt").write_text(prose())
    lines = [json.dumps({"prompt": f"What is {n}?", "answer": f"{n} is {n}."}) for n in range(80)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    pairs = [f"text={tmp_path / 'prose.txt'}", f"pairs={tmp_path / 'pairs.jsonl'}", "size=1m"]
    pairs += ["length=256", "steps=60", "tune_steps=20", "held_tokens=2000", "latency=no"]
    weights = []
    for name in ("one", "again"):
        out = tmp_path / name
        train(
            "tinyllama",
            [*pairs, f"precision={precision}"],
            out,
            resume=False,
            say=lambda status: None,
        )
        weights.append(checkpoint.read(out / "model.safetensors")[0])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
