"""A profile times every operator of a real model, and says what the timing itself cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from edgekit import profile
from edgekit.errors import CorruptArtifactError, UsageError
from edgekit.formats import gguf
from edgekit.profile import OUTSIDE, Operator, Phase, Profile


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Profile:
    return profile.profile(smollm2_gguf, n_prompt=32, n_gen=4, threads=1)


def test_every_matrix_and_every_layer_of_the_model_is_there(smollm2: Profile) -> None:
    for phase in (smollm2.prefill, smollm2.decode):
        weights = {each.weight: each.type for each in phase.operators if each.weight}
        blocks = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        assert weights == dict.fromkeys(blocks, "Q4_1") | {"token_embd": "Q8_0"}
        assert list(phase.by_layer()) == [*map(str, range(30)), OUTSIDE]
        kinds = {each.operator for each in phase.operators}
        assert {"FLASH_ATTN_EXT", "ROPE", "RMS_NORM", "GET_ROWS", "GLU"} <= kinds
        products = [each for each in phase.operators if each.weight]
        assert sum(each.count for each in products) == 30 * 7 + 1


def test_the_output_matrix_belongs_to_no_layer(smollm2: Profile) -> None:
    (output,) = (each for each in smollm2.decode.operators if each.weight == "token_embd")
    assert output.layer is None
    assert smollm2.decode.by_layer()[OUTSIDE] >= output.ms


def test_products_take_most_of_the_time(smollm2: Profile) -> None:
    for phase in (smollm2.prefill, smollm2.decode):
        products = sum(ms for kind, ms in phase.by_kind().items() if kind.startswith("MUL_MAT"))
        assert products > 0.6 * phase.operator_ms


def test_the_cost_of_profiling_is_stated_and_nothing_is_scaled(smollm2: Profile) -> None:
    for phase in (smollm2.prefill, smollm2.decode):
        assert phase.operator_ms <= phase.profiled_ms
        assert sum(phase.by_kind().values()) == pytest.approx(phase.operator_ms)
        assert sum(phase.by_layer().values()) == pytest.approx(phase.operator_ms)
        assert f"{phase.plain_ms:.2f} ms undisturbed" in phase.sentence()
        assert f"({phase.profiled_ms / phase.plain_ms - 1:+.0%})" in phase.sentence()
    body = json.loads(json.dumps(smollm2.to_dict()))
    assert body["decode"]["by_kind"] == smollm2.decode.by_kind()


def test_the_tables_show_both_phases(smollm2: Profile) -> None:
    kinds = profile.kind_rows(smollm2)
    assert [row[0] for row in kinds] == list(smollm2.decode.by_kind())
    layers = profile.layer_rows(smollm2)
    assert [row[0] for row in layers] == list(smollm2.decode.by_layer())
    assert all(len(row) == len(profile.HEAD) for row in (*kinds, *layers))


def test_operators_of_a_token_can_be_counted_alone(smollm2: Profile, smollm2_gguf: Path) -> None:
    assert profile.count_operators(smollm2_gguf) == smollm2.decode.count


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_is_drawn(smollm2: Profile, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"profile{suffix}"
    profile.draw(smollm2, out)
    magic = out.read_bytes()[:8]
    assert magic == b"\x89PNG\r\n\x1a\n" if suffix == ".png" else magic.startswith(b"<?xml")


def test_sums_are_those_of_the_operators() -> None:
    phase = Phase(
        "decode",
        1,
        16,
        10.0,
        14.0,
        (
            Operator("MUL_MAT", "ffn_up", "Q4_K", 0, 2.0, 1.0),
            Operator("MUL_MAT", "ffn_up", "Q4_K", 1, 3.0, 1.0),
            Operator("ROPE", "", "", 1, 1.0, 2.0),
            Operator("MUL_MAT", "output", "Q6_K", None, 4.0, 1.0),
        ),
    )
    assert phase.by_kind() == {"MUL_MAT ffn_up Q4_K": 5.0, "MUL_MAT output Q6_K": 4.0, "ROPE": 1.0}
    assert phase.by_layer() == {"0": 2.0, "1": 4.0, OUTSIDE: 4.0}
    assert (phase.operator_ms, phase.count) == (10.0, 5)
    assert phase.overhead == pytest.approx(0.4)


def test_what_cannot_be_profiled_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a prompt"):
        profile.profile(smollm2_gguf, n_prompt=0, threads=1)
    with pytest.raises(UsageError, match="more than the 8192"):
        profile.profile(smollm2_gguf, n_prompt=8192, n_gen=1, threads=1)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model at all")
    with pytest.raises(CorruptArtifactError):
        profile.profile(broken, threads=1)


@pytest.mark.parametrize("family", ["qwen2", "phi", "gemma3"])
def test_every_family_has_its_layers(family: str, tiny_gguf: Callable[[str], Path]) -> None:
    model = tiny_gguf(family)
    n_layers = gguf.read(model).metadata[f"{gguf.read(model).architecture}.block_count"]
    found = profile.profile(model, n_prompt=8, n_gen=2, threads=1)
    for phase in (found.prefill, found.decode):
        assert list(phase.by_layer()) == [*map(str, range(n_layers)), OUTSIDE]
        assert {each.type for each in phase.operators if each.weight} == {"F32"}
