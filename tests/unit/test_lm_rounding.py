"""A matrix in 4-bit blocks keeps the outputs that its inputs ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.exporters import lm_blocks, lm_rounding
from edgekit.exporters.lm_graph import Blocks

Array = np.ndarray[Any, np.dtype[np.float32]]


def _case(inputs: int) -> tuple[Array, Array]:
    """Weights [48, inputs], and inputs of them, [600, inputs], that are correlated and uneven."""
    random = np.random.default_rng(inputs)
    weights = random.normal(size=(48, inputs))
    mixed = random.normal(size=(600, inputs // 2)) @ random.normal(size=(inputs // 2, inputs))
    reads = (mixed + 0.2 * random.normal(size=mixed.shape)) * np.exp(random.normal(size=inputs))
    return weights.astype(np.float32), reads.astype(np.float32)


def _lost(made: Blocks, weights: Array, reads: Array) -> float:
    """The error of the outputs as a share of their power."""
    wanted = reads @ weights.T
    return float(np.square(reads @ lm_blocks.restored(made).T - wanted).sum() / (wanted**2).sum())


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("inputs", [192, 80], ids=["whole blocks", "a part of a block"])
def test_outputs_are_kept_far_better_than_by_rounding(inputs: int, size: int) -> None:
    weights, reads = _case(inputs)
    square = reads.T @ reads
    made, told = lm_rounding.fit(weights, square, size)
    plain = lm_blocks.quantize(weights, 4, size, np.diag(square))
    found = _lost(made, weights, reads)
    assert found < 0.4 * _lost(plain, weights, reads)
    assert told == pytest.approx(found, rel=0.01)
    assert lm_blocks.restored(made).shape == weights.shape


def test_descent_never_makes_it_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, reads = _case(96)
    lost = []
    for sweeps in (0, 1, 2, 4):
        monkeypatch.setattr(lm_rounding, "_SWEEPS", sweeps)
        lost.append(lm_rounding.fit(weights, reads.T @ reads, 32)[1])
    assert lost == sorted(lost, reverse=True)
    assert lost[1] < 0.9 * lost[0]


def test_inputs_that_are_never_used_and_no_inputs_at_all_do_no_harm() -> None:
    weights, reads = _case(96)
    reads[:, 10:20] = 0
    made, _ = lm_rounding.fit(weights, reads.T @ reads, 32)
    assert np.isfinite(lm_blocks.restored(made)).all()
    assert _lost(made, weights, reads) < 0.01
    made, share = lm_rounding.fit(weights, np.zeros((96, 96), np.float32), 32)
    assert share == 0 and np.isfinite(lm_blocks.restored(made)).all()
