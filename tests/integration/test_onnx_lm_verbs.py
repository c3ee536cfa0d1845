"""Language models in ONNX form are planned and measured like those in GGUF form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from conftest import Ran

import edgekit
from edgekit import language_header, model_cost
from edgekit.errors import SourceError, UsageError
from edgekit.exporter import export
from edgekit.formats import gguf
from edgekit.plan import plan

Float = Callable[[str], edgekit.Artifact]


# Two always: one that is plain, and one with windows and norms behind the parts.
FAMILIES = [
    pytest.param(name, marks=() if name in ("llama3", "gemma3") else pytest.mark.slow)
    for name in tiny.MODELS
    if name not in ("gpt2", "mixtral")
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_token_costs_what_it_costs_in_the_gguf(
    name: str, float_model: Float, tiny_gguf: Callable[[str], Path]
) -> None:
    own = language_header.read(float_model(name).model_path)
    other = gguf.read(tiny_gguf(name))
    here, there = (model_cost.cost(header) for header in (own, other))
    assert here.flops_per_token == there.flops_per_token
    # llama.cpp does not keep the window of Phi-3, and lets each layer look at everything.
    forget = name.startswith("phi3")
    layers = [replace(each, window=None) if forget else each for each in here.layers]
    assert tuple(layers) == there.layers
    assert here.weight_bytes_per_token == pytest.approx(there.weight_bytes_per_token, rel=0.01)
    assert own.parameters == pytest.approx(other.parameters, rel=0.001)


def test_blocks_count_with_their_scales(
    tiny_model: Callable[[str], Path], float_model: Float, tmp_path: Path
) -> None:
    made = export(tiny_model("qwen2"), "onnx", bits=8, receipt=False, out=tmp_path / "out")
    header = language_header.read(made.model_path)
    whole = language_header.read(float_model("qwen2").model_path)
    assert header.parameters == whole.parameters
    assert header.main_type() == "wi8b32"
    matrices = [tensor for tensor in header.tensors if len(tensor.shape) > 1]
    assert {8 * tensor.size_bytes / tensor.elements for tensor in matrices} == {8.5}
    assert sum(tensor.size_bytes for tensor in header.tensors) < made.model_path.stat().st_size


def test_a_plan_is_made_from_the_header(float_model: Float, tmp_path: Path) -> None:
    artifact = float_model("llama3")
    found = plan(artifact.path, "rpi5")
    assert found.fits and found.kv_type == "f32" and found.type == "F32"
    assert found.decode and found.decode.low > 0
    assert found.memory.weights >= artifact.model_path.stat().st_size
    assert any("ONNX Runtime" in remark for remark in found.remarks)
    assert found.recommended.type == "F32"
    for wrong in ({"batch": 2}, {"kv_type": "q8_0"}, {"bits": 4}):
        with pytest.raises(UsageError):
            plan(artifact.path, "rpi5", **wrong)
    shutil.copytree(artifact.path, tmp_path / "cut")
    model = tmp_path / "cut" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1000])
    with pytest.raises(SourceError, match="ends early"):
        plan(model, "rpi5")


@pytest.mark.slow
def test_both_formats_stand_in_one_table(
    float_model: Float, tiny_gguf: Callable[[str], Path]
) -> None:
    artifact = float_model("llama3")
    found = edgekit.bench(
        artifact,
        tiny_gguf("llama3"),
        threads=(1,),
        prompts=(16,),
        answers=(4,),
        depths=(0, 8),
        repetitions=2,
        probe=False,
    )
    own, other = (found.rows_of(model.name) for model in found.models)
    assert [(row.test, row.n_depth) for row in own] == [(row.test, row.n_depth) for row in other]
    assert {row.kv_type for row in own} == {"f32"} and {row.kv_type for row in other} == {"f16"}
    assert all(row.tok_s > 1 and row.peak_rss_bytes for row in own)
    assert found.engine.name == "ort, llamacpp"
    assert len(found.sessions) == 2 and all(row.ttft_s for row in found.sessions)
    with pytest.raises(UsageError, match="f32"):
        edgekit.bench(artifact, kv_types=("q8_0",), probe=False)
    with pytest.raises(UsageError, match="one sequence"):
        edgekit.bench(artifact, batches=(2,), probe=False, sessions=False, threads=(1,))


def test_a_profile_names_weights_and_layers(
    float_model: Float, cli: Callable[..., Ran], tmp_path: Path
) -> None:
    path = float_model("llama3").path
    words = ("-p", "16", "-n", "4", "-r", "1", "-t", "1", "--no-probe", "--no-session")
    done = cli("bench", path, *words, "--profile", "--json", "--out", tmp_path / "speed.png")
    assert done.code == 0, done.stderr
    (found,) = json.loads(done.stdout)["profiles"]
    for phase in (found["prefill"], found["decode"]):
        assert {"0", "1", "outside the layers"} <= set(phase["by_layer"])
        kinds = {(each["operator"], each["weight"]) for each in phase["operators"]}
        assert {("MatMul", "qkv"), ("MatMul", "down"), ("GroupQueryAttention", "")} <= kinds
        # Each matrix of a layer is used once in a pass, however many passes were timed.
        counts = [each["count"] for each in phase["operators"] if each["weight"] == "qkv"]
        assert counts == [1.0] * len(counts)
        assert 0 < phase["operator_ms"] <= 1.05 * phase["profiled_ms"]
    assert (tmp_path / "speed-profile.png").stat().st_size > 5000


def test_a_verdict_names_the_roof_it_was_held_against(float_model: Float) -> None:
    found = edgekit.bench(
        float_model("llama3"), threads=(1,), prompts=(), answers=(8,), repetitions=2, sessions=False
    )
    (verdict,) = found.verdicts
    assert any("measured in float32" in line for line in verdict.evidence)
    assert json.loads(found.to_json())["verdicts"]
