"""Receipts: their JSON form, the gates, what a second measurement may differ by, the identity."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_artifact import build

from edgekit.artifact import Artifact
from edgekit.cli import show_receipt
from edgekit.errors import GateError, ManifestError, UsageError
from edgekit.intervals import Interval
from edgekit.receipt import (
    PROVEN,
    Completion,
    Gates,
    Quality,
    Receipt,
    Reference,
    Size,
    Speed,
    Tokens,
    differences,
)

QUALITY = Quality(
    text="builtin",
    text_sha256="ab" * 32,
    chunks=8,
    n_ctx=512,
    tokens=2040,
    mean_kl=Interval(0.049, 0.045, 0.053),
    median_kl=0.03,
    p90_kl=0.11,
    p99_kl=0.25,
    p999_kl=0.61,
    max_kl=0.9,
    top1=Interval(0.869, 0.854, 0.883),
    perplexity=26.0,
    reference_perplexity=25.14,
    perplexity_ratio=Interval(1.034, 1.021, 1.047),
)
SPEED = Speed(
    decode_tok_s=173,
    prefill_tok_s=875,
    reference_decode_tok_s=107,
    reference_prefill_tok_s=1070,
    decode_ratio=Interval(1.62, 1.55, 1.7),
    prefill_ratio=Interval(0.82, 0.79, 0.86),
    rounds=6,
    n_prompt=256,
    n_gen=24,
    threads=2,
    cpu="a CPU",
    backend="zen4",
    fast_path=True,
    busy=False,
)
RECEIPT = Receipt(
    status=PROVEN,
    reference=Reference("F16", "made of the source", 270_885_952, "Q4_1"),
    completion=Completion("The sea is", " wide.", 2),
    tokens=Tokens("tokenizers 0.23.3", 21, 6),
    quality=QUALITY,
    speed=SPEED,
    size=Size(105_454_144, 6.165, 180),
    gates={"max_kld": 0.1},
    warnings=("SLOWER than F16 on this machine: prefill 0.82x (Q4_K)",),
)


def _json(receipt: Receipt) -> Any:
    return json.loads(json.dumps(receipt.to_dict(), allow_nan=False))


def test_a_receipt_survives_the_manifest() -> None:
    assert Receipt.from_dict(_json(RECEIPT)) == RECEIPT
    assert _json(Receipt()) == {"status": "unproven"}
    assert Receipt.from_dict({"status": "unproven"}) == Receipt()


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["quality"].pop("mean_kl"),
        lambda body: body["quality"].update(mean_kl="small"),
        lambda body: body["quality"].update(chunks=True),
        lambda body: body["quality"]["top1"].update(value=None),
        lambda body: body.update(speed=[]),
        lambda body: body.update(warnings="none"),
        lambda body: body.update(warnings=[{}]),
        lambda body: body.update(gates=[1]),
        lambda body: body.update(status=7),
        lambda body: body.update(reason="\x1b[2Jgone"),
        lambda body: body.update(surprise=1),
    ],
)
def test_a_malformed_receipt_is_one_clear_error(change: Any) -> None:
    body = _json(RECEIPT)
    change(body)
    with pytest.raises(ManifestError, match="the manifest's receipt"):
        Receipt.from_dict(body)


SIZE = 105_454_144
PASSES = {
    "max_kld": 0.05,
    "max_kld_p99": 0.25,
    "min_top1": 0.86,
    "max_ppl_ratio": 1.04,
    "max_size_bytes": SIZE,
    "min_speed_ratio": 0.82,
}
FAILS = {
    "max_kld": (0.04, "mean KL 0.049 [0.045, 0.053] is 0.009 (22.5%) above --max-kld 0.04"),
    "max_kld_p99": (0.2, "p99 of KL 0.25 is 0.05 (25.0%) above --max-kld-p99 0.2"),
    "min_top1": (0.9, "same top-1 86.9% [85.4, 88.3] is 0.031 (3.4%) below --min-top1 0.9"),
    "max_ppl_ratio": (
        1.0,
        "perplexity ratio 1.03 [1.02, 1.05] is 0.034 (3.4%) above --max-ppl-ratio 1",
    ),
    "max_size_bytes": (100_000_000, "size 105.5 MB is 5.454 MB (5.5%) above --max-size 100 MB"),
    "min_speed_ratio": (
        1.0,
        "speed ratio 0.82 [0.79, 0.86] is 0.18 (18.0%) below --min-speed-ratio 1",
    ),
}


@pytest.mark.parametrize("name", PASSES)
def test_each_gate_lets_a_good_figure_pass(name: str) -> None:
    Gates(**{name: PASSES[name]}).check(RECEIPT, SIZE)


@pytest.mark.parametrize("name", FAILS)
def test_each_gate_says_by_how_much_it_is_missed(name: str) -> None:
    limit, words = FAILS[name]
    with pytest.raises(GateError) as caught:
        Gates(**{name: limit}).check(RECEIPT, SIZE)
    assert words in caught.value.message
    assert caught.value.exit_code == 6


def test_all_missed_gates_are_named_at_once() -> None:
    with pytest.raises(GateError, match=r"^6 of 6 gates failed") as caught:
        Gates(**{name: limit for name, (limit, _) in FAILS.items()}).check(RECEIPT, SIZE)
    for _, words in FAILS.values():
        assert words in caught.value.message


def test_a_gate_on_what_was_not_measured_is_missed() -> None:
    Gates(max_size_bytes=SIZE).check(Receipt(), SIZE)
    with pytest.raises(GateError, match="mean KL was not measured"):
        Gates(max_kld=0.1).check(Receipt(), SIZE)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_kld": 0},
        {"max_kld_p99": -1.0},
        {"max_ppl_ratio": float("nan")},
        {"min_speed_ratio": float("inf")},
        {"min_top1": 90},
        {"max_size_bytes": True},
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(limits))):
        Gates(**limits)


def test_only_figures_beyond_the_tolerance_differ() -> None:
    near = replace(QUALITY, mean_kl=Interval(0.0505, 0.04, 0.06), perplexity=26.1)
    other_speed = replace(SPEED, decode_ratio=Interval(0.5, 0.4, 0.6))
    assert differences(RECEIPT, replace(RECEIPT, quality=near, speed=other_speed)) == []
    far = replace(QUALITY, mean_kl=Interval(0.08, 0.07, 0.09))
    assert differences(RECEIPT, replace(RECEIPT, quality=far)) == ["mean_kl was 0.049, is 0.08"]
    smaller = replace(RECEIPT, size=Size(1, 6.165, 180))
    assert differences(smaller, RECEIPT) == ["size_bytes was 1, is 105454144"]


def test_a_receipt_that_says_proven_and_nothing_else_differs() -> None:
    found = differences(Receipt(status=PROVEN), RECEIPT)
    assert "it has no quality" in found and "it has no tokens" in found
    assert differences(Receipt(), RECEIPT) == []


def test_the_card_says_slower_aloud_and_shows_both_sides() -> None:
    card = dict(show_receipt.rows(RECEIPT))
    assert card["distribution"] == "mean KL 0.049 [0.045, 0.053], median 0.03, p99 0.25, p99.9 0.61"
    assert card["same top-1"] == "86.9% [85.4, 88.3]"
    assert "decode 1.62x the speed of F16, prefill 0.82x (SLOWER)" in card["speed here"]
    older = replace(RECEIPT, quality=replace(QUALITY, perplexity=27.0))
    both = dict(show_receipt.rows(RECEIPT, earlier=older))
    assert both["perplexity"].startswith("26 for") and "(manifest: 27 for" in both["perplexity"]
    assert both["same top-1"] == card["same top-1"]


def test_one_lucky_round_does_not_hide_a_slow_file() -> None:
    assert RECEIPT.speed
    lucky = replace(RECEIPT.speed, prefill_ratio=Interval(0.6, 0.4, 1.1))
    assert lucky.slower == ["prefill"]
    even = replace(RECEIPT.speed, prefill_ratio=Interval(0.97, 0.9, 1.1))
    assert even.slower == []


def test_the_receipt_is_no_part_of_what_was_exported(tmp_path: Path) -> None:
    artifact = build(tmp_path / "artifact")
    proven = replace(artifact.manifest, receipt=RECEIPT.to_dict())
    (artifact.path / "manifest.json").write_bytes(proven.to_bytes())
    again = Artifact.open(artifact.path)
    assert again.receipt["status"] == PROVEN
    assert again.sha256 == artifact.sha256
    forged = proven.to_bytes().replace(b'"mean_kl"', b'"mean_KL"')
    (artifact.path / "manifest.json").write_bytes(forged)
    with pytest.raises(ManifestError, match="was changed after"):
        Artifact.open(artifact.path)


def test_the_proof_of_a_gguf_needs_no_onnx_runtime() -> None:
    absent = "import sys; sys.modules.update(onnxruntime=None, onnx=None, torch=None, PIL=None)"
    done = subprocess.run(
        [sys.executable, "-c", f"{absent}; import edgekit.proof"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
