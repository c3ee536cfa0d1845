"""Which model loses more: the answer follows from the intervals, per byte and per token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from edgekit import sensitivity_plot
from edgekit.errors import UsageError
from edgekit.intervals import Interval
from edgekit.sensitivity import sensitivity
from edgekit.sensitivity_report import BitsRow, InputRow, ModelRows, PartRow, Report, answers
from edgekit.sensitivity_subject import _spread, tensor_kind


def _row(
    bits: int, kl: float, *, half: float = 0.1, stored: float | None = None, per_token: float = 4.0
) -> BitsRow:
    """A KL divergence with an interval of ``half`` its size to both sides."""
    return BitsRow(
        bits=bits,
        type=f"Q{bits}_0",
        bits_per_weight=bits + 0.5 if stored is None else stored,
        size_bytes=1000 * bits,
        tokens=4096,
        mean_kl=Interval(kl, kl * (1 - half), kl * (1 + half)),
        top1=Interval(0.9, 0.89, 0.91),
        perplexity_ratio=Interval(1 + kl, 1 + kl / 2, 1 + 2 * kl),
        bytes_per_token=per_token,
    )


def _model(name: str, *rows: BitsRow, quantized: str | None = None) -> ModelRows:
    return ModelRows(
        name=name,
        family="llama",
        quantized=quantized,
        bytes_per_token=rows[0].bytes_per_token,
        reference_perplexity=20.0,
        reference_bits_per_byte=math.log2(20.0) / rows[0].bytes_per_token,
        bits=rows,
    )


def _report(*models: ModelRows) -> Report:
    return Report(models, tuple(answers(models)), 512, 1000, "0" * 64, 500, 2)


def test_disjoint_intervals_name_the_model_and_the_widths() -> None:
    one = _model("A", _row(8, 0.004), _row(4, 0.06), _row(2, 0.9))
    other = _model("B", _row(8, 0.0041), _row(4, 0.03), _row(2, 0.3))
    (answer,) = answers([one, other])
    assert answer.per_byte == {8: None, 4: "A", 2: "A"} == answer.per_token
    assert answer.sentence == (
        "A is more sensitive than B at 4 and 2 bits (2 to 3 times the KL divergence per byte of"
        " text); no difference shown at 8 bits."
    )


def test_intervals_that_meet_show_no_difference() -> None:
    one = _model("A", _row(4, 0.06, half=0.4), _row(2, 0.9, half=0.4))
    other = _model("B", _row(4, 0.03, half=0.4), _row(2, 0.5, half=0.4))
    (answer,) = answers([one, other])
    assert set(answer.per_byte.values()) == {None}
    assert answer.sentence.startswith("No difference shown between A and B at 4 and 2 bits:")


def test_each_model_may_lose_more_somewhere() -> None:
    one = _model("A", _row(4, 0.02), _row(2, 0.9))
    other = _model("B", _row(4, 0.06), _row(2, 0.3))
    (answer,) = answers([one, other])
    assert answer.per_byte == {4: "B", 2: "A"}
    assert "A is more sensitive than B at 2 bits" in answer.sentence
    assert "B is more sensitive than A at 4 bits" in answer.sentence


def test_long_tokens_do_not_make_a_model_look_sensitive() -> None:
    """Twice the loss per token, but tokens three times as long: per byte it loses less."""
    long = _model("long", _row(4, 0.06, per_token=6.0))
    short = _model("short", _row(4, 0.03, per_token=2.0))
    (answer,) = answers([long, short])
    assert (answer.per_byte, answer.per_token) == ({4: "short"}, {4: "long"})
    assert answer.sentence == (
        "short is more sensitive than long at 4 bits (1.5 times the KL divergence per byte of"
        " text). Per token long is the more sensitive at 4 bits: a token of long is 6.0 bytes of"
        " this text, one of short 2.0."
    )


def test_bits_per_byte_are_the_textbook_s() -> None:
    row = _row(4, math.log(2), per_token=2.0)
    assert row.kl_per_byte.value == pytest.approx(0.5)  # one bit per token of two bytes
    assert row.extra_bits_per_byte.value == pytest.approx(math.log2(1 + math.log(2)) / 2)


def test_three_models_give_three_answers() -> None:
    models = [_model(name, _row(4, kl)) for name, kl in (("A", 0.1), ("B", 0.2), ("C", 0.4))]
    assert [answer.models for answer in answers(models)] == [("A", "B"), ("A", "C"), ("B", "C")]


def test_only_shared_widths_are_compared() -> None:
    one, other = _model("A", _row(8, 0.01), _row(4, 0.1)), _model("B", _row(4, 0.01))
    (answer,) = answers([one, other])
    assert answer.per_byte == {4: "A"}


def test_a_quantized_source_and_unlike_sizes_are_said() -> None:
    one = _model("A", _row(4, 0.1, stored=4.8), _row(2, 0.5, stored=5.0), quantized="Q4_1")
    other = _model("B", _row(4, 0.1, stored=4.9), _row(2, 0.9, stored=3.2))
    grid, sizes = _report(one, other).notes
    assert "A starts from Q4_1 weights" in grid and "--off-grid" in grid
    assert "not stored alike at 2 bits: 5.0 and 3.2 bits per weight" in sizes


def test_models_of_unlike_strength_are_said() -> None:
    strong = _model("strong", _row(4, 0.1, per_token=6.0))
    weak = _model("weak", _row(4, 0.01, per_token=3.0))
    (note,) = _report(weak, strong).notes
    assert "floats of strong need 0.72 bits" in note and "those of weak 1.44" in note
    assert _report(strong, strong).notes == []


def test_large_ratios_are_whole_numbers() -> None:
    one = _model("A", _row(4, 2.0), _row(2, 2.9))
    other = _model("B", _row(4, 0.01), _row(2, 0.04))
    (answer,) = answers([one, other])
    assert "(72 to 200 times" in answer.sentence


def test_the_report_is_json_even_with_open_intervals() -> None:
    row = _row(4, 0.1)
    open_row = BitsRow(**{**vars(row), "mean_kl": Interval(0.1, -math.inf, math.inf)})
    body = json.loads(json.dumps(_report(_model("A", open_row)).to_dict(), allow_nan=False))
    found = body["models"][0]["bits"][0]
    assert found["mean_kl"] == {"value": 0.1, "low": None, "high": None}
    assert found["kl_per_byte"]["low"] is None and found["kl_per_byte"]["value"] > 0


def test_layers_are_taken_from_both_ends_and_evenly_between() -> None:
    assert _spread(list(range(30)), 4) == [0, 10, 19, 29]
    assert _spread([0, 1, 2], 8) == [0, 1, 2]
    assert _spread(list(range(5)), 1) == [0]


def test_a_tensor_s_kind_is_its_name_without_its_layer() -> None:
    assert tensor_kind("blk.11.attn_q.weight") == "attn_q"
    assert tensor_kind("token_embd.weight") == "token_embd"


def test_no_model_and_no_width_are_refused() -> None:
    for models, bits in (([], (4,)), (["smollm2-135m"], ())):
        with pytest.raises(UsageError):
            sensitivity(models, "text", bits=bits)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures_are_drawn_of_everything_that_was_measured(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    parts = [PartRow(n, ("Q2_K",), 0.3, Interval(0.1, 0.09, 0.12)) for n in ("attn_q", "ffn_down")]
    layer = PartRow("0", ("Q2_K", "Q4_0"), 0.5, Interval(0.2, -math.inf, math.inf))
    spread = [InputRow("attn_q", n, 10.0 * (n + 1), 4.0) for n in range(3)]
    rows = vars(_model("A", _row(8, 0.0), _row(2, 0.5)))
    whole = ModelRows(**rows | {"kinds": tuple(parts), "layers": (layer,), "inputs": tuple(spread)})
    report = _report(whole, _model("B", _row(8, 0.01), _row(2, 0.4)))
    written = sensitivity_plot.draw(report, tmp_path / f"loss{suffix}")
    assert [path.name for path in written] == [
        f"loss{suffix}",
        f"loss-tensors{suffix}",
        f"loss-activations{suffix}",
    ]
    assert all(path.stat().st_size > 5000 for path in written)
    alone = sensitivity_plot.draw(_report(_model("B", _row(4, 0.1))), tmp_path / f"b{suffix}")
    assert [path.name for path in alone] == [f"b{suffix}"]
