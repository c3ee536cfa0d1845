"""The band between two formats is what both receipts allow; one matrix among its like is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import cross_format, language_layers
from edgekit.cross_format import CrossFormat, Figure
from edgekit.errors import GateError
from edgekit.intervals import Interval
from edgekit.language_layers import _Point
from edgekit.receipt import Agreement, Gates, Receipt


def _side(**figures: float) -> Any:
    """One whose receipt says so, without any doubt."""
    told = {name: Interval(value, value, value) for name, value in figures.items()}
    agreement = Agreement(
        data="builtin",
        data_sha256="",
        samples=8,
        cosine=told["cosine"],
        least_cosine=0.0,
        max_error=0.0,
        mean_kl=told.get("mean_kl"),
        top1=told.get("top1"),
        top5=None,
        neighbours=told.get("neighbours"),
    )
    path = Path("side")
    return cross_format._Side(path, path, "onnx", Receipt(agreement=agreement), None, False)


def _limit(sides: Any, name: str, own: Gates | None = None) -> Figure:
    value = Interval(0.5, 0.4, 0.6)
    return cross_format._figure(sides, "", name, value, own or Gates())


@pytest.mark.parametrize("noise", [(0.01, 0.3), (0.2, 0.2), (0.5, 0.05)])
def test_no_two_files_that_keep_their_receipts_are_further_apart(
    noise: tuple[float, float],
) -> None:
    """On real vectors, and where both err in the same and in the opposite direction."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((64, 16))
    error = rng.standard_normal((64, 16))
    for sign in (1, -1, None):
        other = rng.standard_normal((64, 16)) if sign is None else sign * error
        mine, theirs = truth + noise[0] * error, truth + noise[1] * other
        sides = _side(cosine=_cosine(mine, truth)), _side(cosine=_cosine(theirs, truth))
        assert _cosine(mine, theirs) >= _limit(sides, "cosine").limit


def _cosine(a: Any, b: Any) -> float:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / lengths).mean())


def test_what_both_lost_adds_up_in_every_figure() -> None:
    sides = (
        _side(cosine=0.99, mean_kl=0.04, top1=0.9, neighbours=0.8),
        _side(cosine=0.99, mean_kl=0.01, top1=0.95, neighbours=1),
    )
    assert _limit(sides, "mean_kl").limit == pytest.approx(0.09 + 0.002)
    assert _limit(sides, "cosine").limit == pytest.approx(1 - 0.04 - 1e-4)
    assert _limit(sides, "top1").limit == pytest.approx(0.85 - 0.02)
    assert _limit(sides, "neighbours").limit == pytest.approx(0.8 - 0.02)
    own = _limit(sides, "mean_kl", Gates(max_kld=0.6))
    assert (own.limit, own.given, own.within) == (0.6, True, True)
    assert not _limit(sides, "top1").within and not _limit(sides, "mean_kl").within


def test_the_error_names_every_figure_outside_and_says_when_no_layer_is_known() -> None:
    figures = tuple(_limit((_side(cosine=1),) * 2, name) for name in ("cosine", "top1"))
    found = CrossFormat(
        *("a", "b", ("onnx F32", "tflite F32"), "images", "builtin", 8),
        figures=figures,
        layers=None,
        blind="b.tflite cannot be looked into",
        notes=(),
    )
    with pytest.raises(GateError) as error:
        cross_format.check([found])
    assert error.value.exit_code == 6
    for word in ("a and b (images)", "cosine 0.5", "top1 0.5", "b.tflite cannot be looked into"):
        assert word in error.value.message
    assert found.to_dict()["within"] is False


def _snr_db(**changed: float) -> dict[_Point, float]:
    """30 layers whose matrices keep 18 to 22 dB, but for the ones that are ``changed``."""
    rng = np.random.default_rng(0)
    found = {
        _Point(layer, part, f"blk.{layer}.{part}.weight", ""): float(rng.uniform(18, 22))
        for layer in range(30)
        for part in ("attn_q", "ffn_down")
    }
    for point in found:
        found[point] = changed.get(f"{point.part}_{point.layer}", found[point])
    return found


def test_one_matrix_that_keeps_10_db_less_than_its_like_is_the_first_to_depart() -> None:
    sound = language_layers._judged(_snr_db(), 4)
    assert sound.first is None and sound.shared == 60
    found = language_layers._judged(_snr_db(ffn_down_17=9.0, attn_q_25=-3.0), 4).first
    assert found is not None and found.tensor == "blk.17.ffn_down.weight"
    assert found.layer == "layer 17" and found.drop_db > 10


def test_what_is_wrong_in_every_layer_departs_in_the_first() -> None:
    everywhere = {f"attn_q_{layer}": 3.0 for layer in range(30)}
    found = language_layers._judged(_snr_db(**everywhere), 4).first
    assert found is not None and found.tensor == "blk.0.attn_q.weight"


@pytest.mark.parametrize("fused", [False, True])
def test_products_of_an_onnx_file_are_cut_as_the_gguf_has_its_matrices(fused: bool) -> None:
    rng = np.random.default_rng(0)
    q, k, v, out, gate, up, down = (
        rng.standard_normal((5, n)).astype(np.float32) for n in (8, 4, 4, 6, 10, 10, 6)
    )
    truth = {
        "0.qkv": np.concatenate([q, k, v], axis=1),
        "0.attention": out,
        "0.gate_up": np.concatenate([gate, up], axis=1),
        "0.fed": down,
    }
    ours = {"blk.0.attn_output.weight": out, "blk.0.ffn_down.weight": down}
    if fused:
        ours |= {"blk.0.attn_qkv.weight": truth["0.qkv"], "blk.0.ffn_up.weight": truth["0.gate_up"]}
    else:
        ours |= {
            f"blk.0.attn_{name}.weight": value for name, value in (("q", q), ("k", k), ("v", v))
        }
        ours |= {"blk.0.ffn_gate.weight": gate, "blk.0.ffn_up.weight": up}
    found = list(language_layers._pairs(ours, truth))
    assert {point.ours for point, _, _ in found} == set(ours)
    assert all(np.array_equal(own, wanted) for _, own, wanted in found)


def test_a_scale_of_each_channel_is_no_loss_where_the_next_matrix_takes_it_back() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.standard_normal((64, 16))
    own = wanted * rng.uniform(0.5, 2, 16)
    power, error = language_layers._compared(own, wanted, fitted=True)
    assert error < 1e-20 * power
    power, error = language_layers._compared(own, wanted, fitted=False)
    assert error > 0.01 * power
    power, error = language_layers._compared(wanted[:, ::-1], wanted, fitted=True)
    assert error > 0.8 * power
