"""Language models become ONNX artifacts that compute, answer and are proved like the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import edgekit
from edgekit.errors import RecipeError, SourceError, UnsupportedModelError, UsageError
from edgekit.exporter import ExportOptions, export, plan
from edgekit.exporters.arch.rope import Rope
from edgekit.receipt import Receipt

# Two always, with what is odd in the others between them: norms behind the parts, windows, biases.
FAMILIES = [
    pytest.param(name, marks=() if name in ("llama3", "gemma3") else pytest.mark.slow)
    for name in tiny.MODELS
    if name not in ("gpt2", "mixtral")
]
COUNT = 64

Array = np.ndarray[Any, Any]


def reference_logits(folder: Path, ids: list[int]) -> Array:
    """Logits of transformers in float32."""
    import torch
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        found: Array = net.eval()(torch.tensor([ids])).logits[0].numpy()
    return found


def some_ids(folder: Path, count: int = COUNT) -> list[int]:
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    return [int(i) for i in np.random.default_rng(7).integers(300, size - 70, count)]


def logits(artifact: edgekit.Artifact, ids: list[int], pieces: tuple[int, ...]) -> Array:
    """Logits of every token, when the text is read in pieces of these lengths."""
    from edgekit.runtimes.ort_engine import OrtEngine

    engine = OrtEngine(artifact.model_path, n_ctx=len(ids), n_batch=len(ids), threads=1)
    found, at = [], 0
    for size in pieces:
        engine.decode(ids[at : at + size], at, outputs=size)
        found.append(engine.logits_block(size).copy())
        at += size
    assert at == len(ids)
    engine.close()
    return np.concatenate(found)


# What is computed


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_however_the_text_is_cut(
    name: str,
    tiny_model: Callable[[str], Path],
    float_model: Callable[[str], edgekit.Artifact],
) -> None:
    ids = some_ids(tiny_model(name))
    expected = reference_logits(tiny_model(name), ids)
    for pieces in ((COUNT,), (20, 1, 1, 30, *[1] * 12)):
        found = logits(float_model(name), ids, pieces)
        assert np.abs(found - expected).max() <= 1e-2
        assert (found.argmax(1) == expected.argmax(1)).all()


def test_a_wrong_rotation_would_be_seen(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids = tiny_model("llama3"), some_ids(tiny_model("llama3"))
    ones = np.ones(16, np.float32)
    monkeypatch.setattr(Rope, "llama3_divisors", lambda self, head_dim: ones)
    wrong = export(folder, "onnx", bits=32, receipt=False, out=tmp_path / "wrong")
    assert np.abs(logits(wrong, ids, (COUNT,)) - reference_logits(folder, ids)).max() > 0.1


@pytest.mark.slow
def test_half_floats_and_eight_bits_stay_close(
    tiny_model: Callable[[str], Path],
    float_model: Callable[[str], edgekit.Artifact],
    tmp_path: Path,
) -> None:
    ids = some_ids(tiny_model("qwen2"))
    exact = logits(float_model("qwen2"), ids, (COUNT,))
    sizes = [float_model("qwen2").model_path.stat().st_size]
    for bits, least in ((16, 0.9999), (8, 0.99), (4, 0.8)):
        artifact = export(
            tiny_model("qwen2"),
            "onnx",
            bits=bits,
            calibration="none",
            receipt=False,
            out=tmp_path / str(bits),
        )
        found = logits(artifact, ids, (COUNT,))
        cosine = (found * exact).sum() / np.linalg.norm(found) / np.linalg.norm(exact)
        assert cosine >= least, bits
        sizes.append(artifact.model_path.stat().st_size)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("name", ["llama3", "phi", "gemma3"])
def test_cells_that_move_are_turned_back(
    name: str, tiny_model: Callable[[str], Path], float_model: Callable[[str], edgekit.Artifact]
) -> None:
    """A key that moved is the key that the token would have had there."""
    from edgekit.runtimes.ort_engine import OrtEngine

    token = some_ids(tiny_model(name))[:1]
    engine = OrtEngine(float_model(name).model_path, n_ctx=COUNT, n_batch=COUNT, threads=1)
    keys = engine._cells["0.key"]
    engine.decode(token, 20)
    there = keys[0, :, 20].copy()
    engine.shift(20, -13)
    moved = keys[0, :, 7].copy()
    engine.decode(token, 7)
    assert np.abs(moved - keys[0, :, 7]).max() < 1e-4
    assert np.abs(moved - there).max() > 1e-3
    engine.close()


# What is answered


def test_a_session_streams_stops_and_goes_on_when_the_context_is_full(
    float_model: Callable[[str], edgekit.Artifact],
) -> None:
    with edgekit.load(float_model("llama3"), n_ctx=32, n_threads=1) as session:
        whole = session.complete("One two three", max_tokens=12)
        assert (whole.finish_reason, len(whole.tokens)) == ("length", 12)
        cut = session.complete("One two three", max_tokens=12, stop=(whole.text[3:6],))
        assert cut.text == whole.text[: whole.text.index(whole.text[3:6])]
        full = session.complete("One two three", max_tokens=100)
        assert full.prompt_tokens + full.decode_tokens <= 33
        assert len(session.complete("One two three", max_tokens=100, endless=True).tokens) == 100


def test_sampling_repeats_with_its_seed_and_keeps_its_cuts(
    float_model: Callable[[str], edgekit.Artifact],
) -> None:
    wild = {"temperature": 5.0, "max_tokens": 12}
    with edgekit.load(float_model("llama3"), n_ctx=64, n_threads=1) as session:
        greedy = session.complete("One two", max_tokens=12)
        first = session.complete("One two", seed=3, **wild)
        assert session.complete("One two", seed=3, **wild).tokens == first.tokens
        assert session.complete("One two", seed=4, **wild).tokens != first.tokens
        assert session.complete("One two", top_k=1, **wild).tokens == greedy.tokens
        assert session.complete("One two", top_p=1e-9, **wild).tokens == greedy.tokens
        assert session.complete("One two", min_p=1.0, **wild).tokens == greedy.tokens
        seen = session.complete("One two", max_tokens=3, logprobs=2)
        assert [len(entry.top) for entry in seen.logprobs] == [2, 2, 2]
        assert all(entry.top[0][1] == entry.logprob for entry in seen.logprobs)
        calmer = session.complete("One two", max_tokens=30, repeat_penalty=10.0, repeat_last_n=30)
        assert len(set(calmer.tokens)) == 30


def test_what_only_the_other_engine_can_do_is_refused(
    float_model: Callable[[str], edgekit.Artifact], tmp_path: Path
) -> None:
    artifact = float_model("llama3")
    for field in ({"kv_type": "q8_0"}, {"prompt_cache": tmp_path / "cache"}, {"n_gpu_layers": 3}):
        with pytest.raises(UsageError):
            edgekit.load(artifact, **field)
    with pytest.raises(UsageError, match="n_ctx"):
        edgekit.load(artifact, n_ctx=1 << 20)


@pytest.mark.parametrize("name", ["llama2", "llama3", "phi3", "gemma3"])
def test_token_ids_are_those_of_the_tokenizer(
    name: str, tiny_model: Callable[[str], Path], float_model: Callable[[str], edgekit.Artifact]
) -> None:
    import tokenizers

    expected = tokenizers.Tokenizer.from_file(str(tiny_model(name) / "tokenizer.json"))
    with edgekit.load(float_model(name), n_ctx=64, n_threads=1) as session:
        for text in ("Grüße, 世界 🙂", "def f(x):\n\treturn x", "  two spaces"):
            ids = session.tokenize(text)
            assert ids == expected.encode(text, add_special_tokens=False).ids
            assert session.detokenize(ids).strip() == text.strip()


# What is proved


@pytest.mark.slow
def test_a_receipt_says_what_it_says_of_a_gguf(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = export(tiny_model("qwen2"), "onnx", bits=8, out=tmp_path / "out")
    receipt = Receipt.from_dict(artifact.receipt)
    assert receipt.status == "proven"
    assert receipt.tokens and receipt.tokens.judge.startswith("tokenizers")
    assert receipt.quality and 0 < receipt.quality.mean_kl.value < 0.1
    assert receipt.speed and receipt.speed.backend and "onnxruntime" in receipt.speed.backend
    assert receipt.reference and receipt.reference.type == "F32"
    assert receipt.size and 8 < receipt.size.bits_per_weight < 10
    assert sorted(path.name for path in artifact.path.iterdir()) == sorted(
        ["manifest.json", *(file.path for file in artifact.manifest.files)]
    )


def test_four_bits_are_fitted_to_a_text_and_say_what_they_lost(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama-linear")
    made = export(folder, "onnx", bits=4, chunks=2, receipt=False, out=tmp_path / "out")
    fitted = made.manifest.details["fitted"]
    assert (fitted["chunks"], fitted["matrices"]) == (2, 8)
    assert 0 < fitted["worst"]["lost"] < 0.02
    with edgekit.load(made, n_ctx=COUNT, n_threads=1) as session:
        assert session.complete("One two three", max_tokens=4).tokens


@pytest.mark.parametrize(
    "name", ["gemma3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2", "phi", "phi3"))]
)
def test_scaled_columns_change_nothing(
    name: str,
    tiny_model: Callable[[str], Path],
    float_model: Callable[[str], edgekit.Artifact],
    tmp_path: Path,
) -> None:
    """Scales of inputs are taken up by norms, values and "up", with their biases."""
    from edgekit.exporters import lm_graph
    from edgekit.exporters.arch.family import family_of
    from edgekit.exporters.lm_equalized import Equalized
    from edgekit.exporters.lm_weights import MATRICES, Weights
    from edgekit.source import source

    found = source(tiny_model(name))
    weights = Weights(family_of(found).decoder(), found)
    random, equal = np.random.default_rng(3), Equalized(weights)
    for layer in range(weights.decoder.layers):
        sizes = {part: weights.matrix(f"{layer}.{part}").shape[1] for part in MATRICES}
        powers = {part: np.exp(2 * random.normal(size=n)) for part, n in sizes.items()}
        scales = equal.scale(layer, powers, dict.fromkeys(powers, 64))
        assert scales and all(scale.max() > 1.5 > scale.min() for scale in scales.values())
    shutil.copytree(float_model(name).path, tmp_path / "equal")
    path = tmp_path / "equal" / "model.onnx"
    path.unlink()
    lm_graph.write(weights.decoder, equal, lambda part: lm_graph.Plain(equal.matrix(part)), path)
    ids = some_ids(tiny_model(name))
    made = edgekit.Artifact(path.parent, float_model(name).manifest)
    exact = logits(float_model(name), ids, (COUNT,))
    assert np.abs(logits(made, ids, (COUNT,)) - exact).max() < 2e-3


@pytest.mark.slow
def test_a_text_makes_four_bits_better_and_the_same_bytes_every_time(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from edgekit import evaluate

    folder, made = tiny_model("llama-linear"), {}
    exact = export(folder, "onnx", bits=32, receipt=False, out=tmp_path / "float")
    for name, options in (
        ("rounded", {"calibration": "none"}),
        ("fitted", {"chunks": 16}),
        ("again", {"chunks": 16}),
    ):
        made[name] = export(folder, "onnx", bits=4, receipt=False, out=tmp_path / name, **options)
    assert made["fitted"].sha256 == made["again"].sha256
    assert made["fitted"].manifest.details["fitted"]["matrices"] == 8
    text = evaluate.read_text(None)
    kl = {
        name: evaluate.compare(made[name].path, exact.path, text, n_ctx=256, chunks=8, threads=1)
        for name in ("rounded", "fitted")
    }
    assert kl["fitted"].mean_kl.value < kl["rounded"].mean_kl.value


# What is refused


def test_a_plan_is_what_comes_out(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    options = ExportOptions(bits=4, calibration="none", overrides=(("down", "F16"),))
    found = plan(tiny_model("qwen2"), "onnx", options=options)
    artifact = export(
        tiny_model("qwen2"), "onnx", out=tmp_path / "out", receipt=False, **vars(options)
    )
    assert abs(artifact.model_path.stat().st_size - found.size_bytes) < 100_000
    assert {t.type for t in found.tensors if "down" in t.name} == {"F16"}
    assert {t.type for t in found.tensors if t.name == "embedding"} == {"weight_only_wi8b64"}
    assert {t.type for t in found.tensors if t.name.endswith("qkv")} == {"weight_only_wi4b32"}
    assert {t.type for t in found.tensors if "gate" in t.name} == {"weight_only_wi4b64"}


@pytest.mark.parametrize(
    ("width", "kind"), [(128, "weight_only_wi8b64"), (96, "weight_only_wi8b32"), (80, "F16")]
)
def test_a_table_has_whole_blocks(width: int, kind: str, tiny_model: Callable[[str], Path]) -> None:
    from edgekit.exporters import lm_quantizer
    from edgekit.exporters.arch.family import family_of
    from edgekit.recipe import Recipe
    from edgekit.source import source

    decoder = replace(family_of(source(tiny_model("qwen2"))).decoder(), width=width)
    found = lm_quantizer.types(decoder, Recipe(format="onnx", type="weight_only_wi4b64"))
    assert found["embedding"] == kind


@pytest.mark.parametrize(
    "options",
    [
        {"type": "dynamic_wi8_afp32"},
        {"bits": 5},
        {"bits": 8, "calibration": "builtin"},
        {"bits": 4, "overrides": (("nothing", "F16"),)},
        {"bits": 4, "overrides": (("embedding", "weight_only_wi4b32"),)},
        {"fusion": "none"},
    ],
)
def test_what_makes_no_sense_is_one_clear_error(
    options: dict[str, Any], tiny_model: Callable[[str], Path]
) -> None:
    with pytest.raises(RecipeError):
        plan(tiny_model("qwen2"), "onnx", options=ExportOptions(**options))


def test_a_family_without_a_graph_and_a_folder_without_a_matrix_are_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        plan(tiny_model("gpt2"), "onnx")
    folder = tmp_path / "lacking"
    shutil.copytree(tiny_model("llama3"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(SourceError, match="lm_head"):
        export(folder, "onnx", bits=32, receipt=False, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
