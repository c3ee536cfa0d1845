"""What bounds a model is told from its header, its timings and the machine's limits alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import roofline
from edgekit.errors import UsageError
from edgekit.formats import gguf
from edgekit.formats.ggml_types import TYPES
from edgekit.formats.gguf import GgufHeader, GgufTensor
from edgekit.probe import KernelLimit, Limit, Limits, OperatorLimit

KINDS = {kind.name: kind for kind in TYPES.values()}

# Figures of a quiet machine with two cores and AVX-512: bytes and float32 FLOP a second.
MACHINE = Limits("two cores", (Limit(1, 38e9, 190e9), Limit(2, 70e9, 380e9)))


@dataclass(frozen=True)
class Row:
    model_type: str = "F16"
    size_bytes: int = 270_885_952
    n_threads: int = 1
    n_prompt: int = 0
    n_gen: int = 128
    n_depth: int = 0
    n_batch: int = 512
    n_seqs: int = 1
    kv_type: str = "f16"
    samples_s: tuple[float, ...] = (1.0,)


def row(tok_s: float, **fields: Any) -> Row:
    """A row of 128 decoded tokens, unless ``fields`` say otherwise, at ``tok_s`` in all."""
    if "n_prompt" in fields:
        fields["n_gen"] = 0
    made = Row(**fields)
    seconds = (made.n_prompt or made.n_gen * made.n_seqs) / tok_s
    return replace(made, samples_s=(seconds * 0.99, seconds, seconds * 1.5))


def header(
    tensors: dict[str, tuple[tuple[int, ...], str]], family: str = "llama", **metadata: Any
) -> GgufHeader:
    found = []
    for name, (shape, kind) in tensors.items():
        elements = 1
        for length in shape:
            elements *= length
        found.append(GgufTensor(name, shape, kind, 0, KINDS[kind].size_bytes(elements)))
    body = {"general.architecture": family}
    body |= {f"{family}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    return GgufHeader(3, body, tuple(found), 32, 0, 0)


def smollm2(kind: str, table: str) -> GgufHeader:
    """SmolLM2-135M with one type for its blocks, one for the table that is tied to the output."""
    tensors: dict[str, tuple[tuple[int, ...], str]] = {
        "token_embd.weight": ((576, 49152), table),
        "output_norm.weight": ((576,), "F32"),
    }
    for i in range(30):
        tensors |= {
            f"blk.{i}.attn_norm.weight": ((576,), "F32"),
            f"blk.{i}.ffn_norm.weight": ((576,), "F32"),
            f"blk.{i}.attn_q.weight": ((576, 576), kind),
            f"blk.{i}.attn_k.weight": ((576, 192), kind),
            f"blk.{i}.attn_v.weight": ((576, 192), kind),
            f"blk.{i}.attn_output.weight": ((576, 576), kind),
            f"blk.{i}.ffn_gate.weight": ((576, 1536), kind),
            f"blk.{i}.ffn_up.weight": ((576, 1536), kind),
            f"blk.{i}.ffn_down.weight": ((1536, 576), kind),
        }
    return header(
        tensors,
        block_count=30,
        embedding_length=576,
        attention__head_count=9,
        attention__head_count_kv=3,
    )


F16 = roofline.cost(smollm2("F16", "F16"))
Q8_0 = roofline.cost(smollm2("Q8_0", "Q8_0"))
Q4_0 = roofline.cost(smollm2("Q4_0", "Q8_0"))


# Costs


def test_a_tied_embedding_table_is_read_once_for_each_token(smollm2_gguf: Path) -> None:
    found = gguf.read(smollm2_gguf)
    cost = roofline.cost(found)
    assert cost.weight_bytes_per_token == sum(tensor.size_bytes for tensor in found.tensors)
    matrices = [tensor.elements for tensor in found.tensors if len(tensor.shape) == 2]
    assert cost.flops_per_token == 2 * sum(matrices)
    assert cost.types == ("Q4_1", "Q8_0")


def test_of_a_table_that_is_only_looked_into_one_row_is_read() -> None:
    untied = header({"token_embd.weight": ((64, 100), "F16"), "output.weight": ((64, 100), "F32")})
    cost = roofline.cost(untied)
    assert cost.weight_bytes_per_token == 64 * 2 + 64 * 100 * 4
    assert cost.flops_per_token == 2 * 64 * 100


def test_of_the_experts_only_the_active_ones_count() -> None:
    routed = header(
        {"blk.0.ffn_up_exps.weight": ((64, 32, 8), "F16"), "output.weight": ((64, 10), "F16")},
        expert_count=8,
        expert_used_count=2,
    )
    cost = roofline.cost(routed)
    one_expert, output = 64 * 32 * 2, 64 * 10 * 2
    assert cost.weight_bytes(1) == pytest.approx(2 * one_expert + output)
    assert cost.flops_per_token == 2 * (2 * 64 * 32) + 2 * 64 * 10
    # Two tokens may pick the same expert: 8 x (1 - (6/8)^2) of them are expected.
    assert cost.weight_bytes(2) == pytest.approx(3.5 * one_expert + output)
    assert cost.weight_bytes(1000) == pytest.approx(8 * one_expert + output)


def test_the_cache_has_a_key_and_a_value_for_each_kv_head_and_layer() -> None:
    assert F16.kv_bytes_per_position("f16") == 30 * 3 * (64 + 64) * 2
    assert F16.kv_bytes_per_position("q8_0") == 30 * 3 * (64 + 64) * 34 / 32
    assert F16.kv_bytes(100) == 100 * F16.kv_bytes_per_position()
    assert F16.attention_flops(100) == 100 * 30 * 9 * 2 * (64 + 64)
    with pytest.raises(UsageError, match="kv_type 'q9' is unknown"):
        F16.kv_bytes(1, "q9")


@pytest.mark.parametrize(
    ("family", "fields", "sliding"),
    [
        ("gemma3", {}, 5),
        ("llama", {}, 0),
        ("llama", {"attention__sliding_window_pattern": 2}, 3),
        ("llama", {"attention__sliding_window_pattern": [True, False, True, True, True, False]}, 4),
    ],
    ids=["a family's own", "unknown", "every second", "a list"],
)
def test_a_sliding_window_bounds_what_its_layers_read(
    family: str, fields: dict[str, Any], sliding: int
) -> None:
    cost = roofline.cost(
        header(
            {},
            family,
            block_count=6,
            attention__head_count=4,
            attention__key_length=16,
            attention__value_length=16,
            attention__sliding_window=128,
            **fields,
        )
    )
    per_layer = 4 * 32 * 2
    assert cost.kv_bytes(100) == 6 * 100 * per_layer
    assert cost.kv_bytes(1000) == (sliding * 128 + (6 - sliding) * 1000) * per_layer


def test_a_layer_without_kv_heads_keeps_and_computes_nothing_per_position() -> None:
    hybrid = header(
        {},
        block_count=3,
        attention__head_count=[4, 4, 4],
        attention__head_count_kv=[2, 0, 0],
        attention__key_length=8,
        attention__value_length=8,
    )
    cost = roofline.cost(hybrid)
    assert cost.kv_bytes_per_position() == 2 * 16 * 2
    assert cost.attention_flops(10) == 10 * 2 * 4 * 16


# Verdicts


@pytest.mark.parametrize(
    ("cost", "tok_s", "fields", "kind", "share"),
    [
        (F16, 95, {"n_threads": 1}, "memory", 0.68),
        (F16, 107, {"n_threads": 2}, "overhead", 0.59),
        (Q8_0, 149, {"n_threads": 1}, "memory", 0.57),
        (Q4_0, 198, {"n_threads": 1}, "memory", 0.47),
        (Q4_0, 223, {"n_threads": 2}, "overhead", 0.71),
        (Q4_0, 779, {"n_threads": 1, "n_prompt": 512}, "compute", 0.94),
        (Q4_0, 1269, {"n_threads": 2, "n_prompt": 512}, "compute", 0.77),
        (Q8_0, 896, {"n_threads": 2, "n_prompt": 512}, "compute", 0.54),
    ],
    ids=lambda value: None if isinstance(value, roofline.ModelCost) else str(value),
)
def test_known_speeds_get_the_verdict_that_is_known_to_be_right(
    cost: roofline.ModelCost, tok_s: float, fields: dict[str, int], kind: str, share: float
) -> None:
    found = roofline.verdict([row(tok_s, **fields)], cost, MACHINE)
    assert found.kind == kind
    assert found.share == pytest.approx(share, abs=0.03)


def test_each_kind_has_its_sentence() -> None:
    one = roofline.verdict([row(95)], F16, MACHINE)
    assert one.sentence == "memory-bound at 68% of the limit"
    prefill = roofline.verdict([row(1269, n_threads=2, n_prompt=512)], Q4_0, MACHINE)
    assert prefill.sentence == "compute-bound at 77% of the limit"
    lone = roofline.verdict([row(223, n_threads=2)], Q4_0, MACHINE)
    assert lone.sentence == "overhead-bound: memory and arithmetic explain only 45% of the time"


@pytest.mark.parametrize(
    ("speeds", "sentence"),
    [
        ({1: 198, 2: 200}, "a second thread adds nothing"),
        ({1: 198, 2: 223}, "a second thread adds only 13%"),
        ({1: 198, 2: 160}, "a second thread makes it 19% slower"),
        ({2: 198, 4: 200}, "4 threads instead of 2 add nothing"),
        ({2: 198, 4: 160}, "4 threads instead of 2 make it 19% slower"),
    ],
)
def test_threads_that_bring_too_little_are_named(speeds: dict[int, float], sentence: str) -> None:
    wide = replace(MACHINE, rows=(*MACHINE.rows, Limit(4, 140e9, 760e9)))
    rows = [row(speed, n_threads=count) for count, speed in speeds.items()]
    found = roofline.verdict(rows, Q4_0, wide)
    assert found.rows[-1].sentence == f"overhead-bound: {sentence}"
    assert found.rows[-1].kind == "overhead"


def test_a_second_thread_that_adds_nothing_is_no_overhead_where_the_memory_is_full() -> None:
    saturated = Limits("small board", (Limit(1, 10e9, 20e9), Limit(2, 10.5e9, 40e9)))
    pair = [row(33, n_threads=1), row(34, n_threads=2)]
    assert [each.kind for each in roofline.verdict(pair, F16, saturated).rows] == ["memory"] * 2


def test_a_row_above_the_limit_is_at_the_limit_and_shows_its_raw_figure() -> None:
    found = roofline.verdict([row(150)], F16, MACHINE)
    assert found.sentence == "memory-bound, at the limit (raw figure 107%)"
    assert found.share > 1


ENGINE = replace(
    MACHINE,
    kernels=tuple(KernelLimit(kind, 1, 400e9, 80e9, 60e9) for kind in ("Q4_0", "Q8_0")),
    operators=(OperatorLimit(1, 0.5e-6),),
)


def test_the_engines_own_products_are_the_better_ceiling() -> None:
    plain, engine = (
        roofline.verdict([row(779, n_prompt=512)], Q4_0, limits) for limits in (MACHINE, ENGINE)
    )
    assert engine.share < 0.6 * plain.share
    told = "measured with the engine's Q4_0, Q8_0 products of 512 columns"
    assert any(told in line for line in engine.evidence)
    assert any("measured in float32" in line for line in plain.evidence)


def test_decoding_can_be_bound_by_the_engine_unpacking_weights_for_one_column() -> None:
    found = roofline.verdict([row(198)], Q4_0, ENGINE)
    assert found.sentence == "compute-bound at 67% of the limit"
    assert any("products of 1 column" in line for line in found.evidence)


def test_left_over_time_is_named_as_far_as_it_was_measured() -> None:
    bare = roofline.verdict([row(140)], Q4_0, MACHINE).headline
    assert [part.name for part in bare.parts] == ["memory", "arithmetic", "not explained"]
    known = roofline.verdict([row(140)], Q4_0, ENGINE, n_operators=1000, host_ms=0.3)
    parts = {part.name: part.ms for part in known.headline.parts}
    assert parts["memory"] == pytest.approx(2.40, abs=0.01)
    # 269 MFLOP of products at 80 GFLOP/s, and 4 of attention at the float32 peak.
    assert parts["arithmetic"] == pytest.approx(3.36 + 0.02, abs=0.01)
    assert parts["dispatch and barriers"] == pytest.approx(0.5)
    assert sum(parts.values()) == pytest.approx(known.headline.token_ms)
    assert "sampling, text and Python add 0.30 ms a token to a session" in known.evidence


def test_parts_that_overlap_leave_nothing_unexplained() -> None:
    found = roofline.verdict([row(1000, n_prompt=512)], Q4_0, MACHINE).headline
    parts = {part.name: part.ms for part in found.parts}
    assert parts["memory"] + parts["arithmetic"] > found.token_ms
    assert parts["not explained"] == 0


def test_sequences_side_by_side_share_one_reading_of_the_weights() -> None:
    (single,) = roofline.verdict([row(95)], F16, MACHINE).rows
    (four,) = roofline.verdict([row(95, n_seqs=4)], F16, MACHINE).rows
    assert single.memory_ms == pytest.approx(4 * four.memory_ms, rel=0.03)


def test_busy_limits_are_said_to_be_so() -> None:
    found = roofline.verdict([row(95)], F16, replace(MACHINE, busy=True))
    assert "while others used the machine" in found.evidence[-1]


def test_rows_that_cannot_be_judged_are_refused() -> None:
    with pytest.raises(UsageError, match="no row"):
        roofline.verdict([], F16, MACHINE)
    with pytest.raises(UsageError, match="not measured with 4 threads"):
        roofline.verdict([row(95, n_threads=4)], F16, MACHINE)


@given(
    tok_s=st.floats(0.01, 1e6),
    threads=st.sampled_from([1, 2]),
    prompt=st.sampled_from([0, 1, 512, 5000]),
)
def test_every_verdict_is_whole_and_fits_json(tok_s: float, threads: int, prompt: int) -> None:
    fields = {"n_prompt": prompt} if prompt else {}
    found = roofline.verdict([row(tok_s, n_threads=threads, **fields)], F16, MACHINE)
    (only,) = found.rows
    assert only.share >= 0
    assert sum(part.ms for part in only.parts) >= only.token_ms * (1 - 1e-9)
    body = json.loads(json.dumps(found.to_dict()))
    assert (body["kind"], body["sentence"]) == (found.kind, found.sentence)


# Advice


def test_what_was_not_measured_is_not_guessed() -> None:
    found = roofline.verdict([row(95)], F16, MACHINE).advice
    assert [(each.topic, each.helps) for each in found] == [
        ("threads", None),
        ("fewer bits", None),
        ("batch size", None),
        ("smaller context", None),
    ]
    assert all("not measured" in each.text for each in found)
    assert "run with -t 1,2" in found[0].text


def test_advice_rests_on_rows_that_differ_in_one_setting() -> None:
    rows = [
        row(95, n_threads=1),
        row(97, n_threads=2),
        row(190, n_threads=2, n_seqs=4),
        row(60, n_threads=2, n_depth=4096),
        row(500, n_threads=2, n_prompt=512),
        row(1, n_threads=1, kv_type="q8_0", n_seqs=8),
    ]
    others = [row(170, n_threads=2, model_type="Q4_0", size_bytes=91_700_000)]
    found = roofline.verdict(rows, F16, MACHINE, others=others)
    told = {each.topic: (each.helps, each.text) for each in found.advice}
    assert told["threads"] == (
        False,
        "threads: against 1 thread, 2 threads 1.02 times as fast (97 against 95 tok/s):"
        " 1 thread will do",
    )
    assert told["fewer bits"] == (
        True,
        "fewer bits: Q4_0 has 0.34 times the bytes of F16 and runs 1.75 times as fast"
        " (170 against 97 tok/s)",
    )
    assert told["batch size"] == (
        True,
        "batch size: 4 sequences at once, against 1, run 1.96 times as fast"
        " (190 against 97 tok/s) all together, and 0.49 times as fast each",
    )
    assert told["smaller context"] == (
        True,
        "smaller context: behind 0 tokens, against 4096, it runs 1.62 times as fast"
        " (97 against 60 tok/s)",
    )


def test_a_prompt_gets_no_advice_on_generating() -> None:
    found = roofline.verdict([row(1269, n_threads=2, n_prompt=512)], Q4_0, MACHINE)
    assert [each.topic for each in found.advice] == ["threads", "fewer bits"]
