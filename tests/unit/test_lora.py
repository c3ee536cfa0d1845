"""A LoRA folder is merged exactly, or refused by name before anything is written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edgekit.errors import EdgekitError, SourceError, UnsafeModelError, UnsupportedModelError
from edgekit.exporters import lora
from edgekit.formats import gguf
from edgekit.source import ModelSource
from edgekit.source import source as open_source

WIDTH, KV_WIDTH, RANK = 16, 8, 4
Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "/nowhere/at/all",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj"],
    "bias": "none",
}
LLAMA = {
    "num_hidden_layers": 1,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}
Arrays = dict[str, NDArray[Any]]


def _random(*shape: int) -> NDArray[np.float32]:
    seed = np.random.default_rng(list(shape))
    return seed.standard_normal(shape).astype(np.float32)


def _matrices(module: str, out: int, inner: int = WIDTH, rank: int = RANK) -> Arrays:
    return {
        f"base_model.model.{module}.lora_A.weight": _random(rank, inner),
        f"base_model.model.{module}.lora_B.weight": _random(out, rank),
    }


PLAIN = {**_matrices(Q, WIDTH), **_matrices(K, KV_WIDTH)}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes an adapter folder: ``folder(tensors, r=8)``; a key set to None is left out."""

    def make(tensors: Arrays = PLAIN, **config: Any) -> Path:
        path = tmp_path / "adapter"
        path.mkdir(exist_ok=True)
        body = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
        (path / lora.CONFIG).write_text(json.dumps(body))
        save_file(tensors, path / lora.WEIGHTS)
        return path

    return make


def _model(path: Path, family: str, config: dict[str, Any], tensors: Arrays) -> ModelSource:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": family, **config}))
    save_file(tensors, path / "model.safetensors")
    return open_source(path)


@pytest.fixture
def model(tmp_path: Path) -> ModelSource:
    """The part of a llama that the adapters here are for: 4 query heads, 2 key heads."""
    tensors = {
        "model.embed_tokens.weight": _random(32, WIDTH),
        f"{Q}.weight": _random(WIDTH, WIDTH),
        f"{K}.weight": _random(KV_WIDTH, WIDTH),
    }
    return _model(tmp_path / "model", "llama", LLAMA, tensors)


def _change(module: str, tensors: Arrays = PLAIN) -> NDArray[np.float32]:
    a = tensors[f"base_model.model.{module}.lora_A.weight"].astype(np.float32)
    b = tensors[f"base_model.model.{module}.lora_B.weight"].astype(np.float32)
    return np.asarray(b @ a, dtype=np.float32)


def _scale(adapter: lora.Adapter, module: str, shape: tuple[int, int]) -> float:
    """By how much of B A the adapter really moves a weight."""
    moved = adapter.patch(f"{module}.weight", np.zeros(shape, np.float32))
    change = _change(module)
    assert np.allclose(moved / change, (moved / change).flat[0], rtol=1e-4)
    return float((moved / change).flat[0])


# What is merged


def test_a_merged_weight_is_the_weight_plus_alpha_over_rank_times_b_a(
    folder: Callable[..., Path],
) -> None:
    weight = _random(KV_WIDTH, WIDTH)
    merged = lora.open_adapter(folder()).patch(f"{K}.weight", weight)
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged, weight + 8 / RANK * _change(K), atol=1e-5)


def test_a_tensor_that_the_adapter_does_not_change_comes_back_as_the_same_object(
    folder: Callable[..., Path],
) -> None:
    adapter = lora.open_adapter(folder())
    weight = _random(WIDTH, WIDTH)
    for name in (f"{Q}.bias", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        assert adapter.patch(name, weight) is weight


def test_the_weight_that_is_given_stays_as_it_was(folder: Callable[..., Path]) -> None:
    weight = _random(WIDTH, WIDTH)
    before = weight.copy()
    lora.open_adapter(folder()).patch(f"{Q}.weight", weight)
    np.testing.assert_array_equal(weight, before)


def test_rslora_divides_by_the_root_of_the_rank(folder: Callable[..., Path]) -> None:
    adapter = lora.open_adapter(folder(use_rslora=True))
    assert _scale(adapter, Q, (WIDTH, WIDTH)) == pytest.approx(8 / math.sqrt(RANK), rel=1e-5)


def test_patterns_give_single_modules_a_rank_and_an_alpha_of_their_own(
    folder: Callable[..., Path],
) -> None:
    tensors = {**_matrices(Q, WIDTH), **_matrices(K, KV_WIDTH, rank=2)}
    path = folder(tensors, rank_pattern={"k_proj": 2}, alpha_pattern={rf"^{Q}": 3, "k_proj": 5})
    adapter = lora.open_adapter(path)
    zeros = np.zeros((KV_WIDTH, WIDTH), np.float32)
    np.testing.assert_allclose(
        adapter.patch(f"{K}.weight", zeros), 5 / 2 * _change(K, tensors), atol=1e-5
    )
    assert _scale(adapter, Q, (WIDTH, WIDTH)) == pytest.approx(3 / RANK, rel=1e-5)


def test_a_pattern_matches_the_end_of_a_name_and_never_half_a_part(
    folder: Callable[..., Path],
) -> None:
    adapter = lora.open_adapter(folder(alpha_pattern={"proj": 100, "layers.0": 100}))
    assert _scale(adapter, Q, (WIDTH, WIDTH)) == pytest.approx(8 / RANK, rel=1e-5)


def test_fan_in_fan_out_turns_the_change_round(folder: Callable[..., Path]) -> None:
    module = "transformer.h.0.attn.c_attn"
    tensors = _matrices(module, 3 * WIDTH)
    adapter = lora.open_adapter(folder(tensors, fan_in_fan_out=True))
    merged = adapter.patch(f"{module}.weight", np.zeros((WIDTH, 3 * WIDTH), np.float32))
    np.testing.assert_allclose(merged, 2 * _change(module, tensors).T, atol=1e-5)


@pytest.mark.parametrize("name", [f"{K}.weight", f"{K}.weight".removeprefix("model.")])
def test_a_folder_that_names_its_tensors_without_the_head_is_merged_too(
    folder: Callable[..., Path], name: str
) -> None:
    weight = _random(KV_WIDTH, WIDTH)
    assert lora.open_adapter(folder()).patch(name, weight) is not weight


def test_half_precision_matrices_are_widened_before_they_are_multiplied(
    folder: Callable[..., Path],
) -> None:
    half = {name: value.astype(np.float16) for name, value in PLAIN.items()}
    merged = lora.open_adapter(folder(half)).patch(
        f"{Q}.weight", np.zeros((WIDTH, WIDTH), np.float32)
    )
    np.testing.assert_allclose(merged, 2 * _change(Q, half), atol=1e-5)


def test_the_hash_changes_with_the_config_and_with_the_weights(
    folder: Callable[..., Path],
) -> None:
    other = {name: value + 1 for name, value in PLAIN.items()}
    hashes = [
        lora.open_adapter(path()).sha256
        for path in (folder, lambda: folder(lora_alpha=9), lambda: folder(other), folder)
    ]
    assert hashes[0] == hashes[3]
    assert len(set(hashes)) == 3


def test_a_config_as_peft_writes_it_is_accepted(folder: Callable[..., Path]) -> None:
    written = {
        "alora_invocation_tokens": None,
        "auto_mapping": {
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
        },
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "loftq_config": {},
        "lora_bias": False,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "use_dora": False,
        "use_qalora": False,
    }
    path = folder()
    (path / lora.CONFIG).write_text(json.dumps({**CONFIG, **written}))
    assert lora.open_adapter(path).alpha == 8


# What is written for llama.cpp


def _written(path: Path) -> tuple[gguf.GgufHeader, Arrays]:
    header = gguf.read(path)
    data = path.read_bytes()
    return header, {
        tensor.name: np.frombuffer(data, "<f4", tensor.elements, tensor.offset).reshape(
            tensor.shape[::-1]
        )
        for tensor in header.tensors
    }


def test_a_kept_adapter_names_itself_and_its_alpha(
    folder: Callable[..., Path], model: ModelSource, tmp_path: Path
) -> None:
    lora.write_gguf(lora.open_adapter(folder()), model, tmp_path / "a.gguf")
    header, arrays = _written(tmp_path / "a.gguf")
    kept = {key: header.metadata[key] for key in header.metadata if key.startswith("adapter")}
    assert kept == {"adapter.type": "lora", "adapter.lora.alpha": 8.0}
    assert header.metadata["general.type"] == "adapter"
    assert header.architecture == "llama"
    names = {"blk.0.attn_k.weight", "blk.0.attn_q.weight"}
    assert set(arrays) == {f"{name}.lora_{part}" for name in names for part in "ab"}


def test_a_kept_adapter_holds_the_rows_in_the_order_of_the_exported_weight(
    folder: Callable[..., Path], model: ModelSource, tmp_path: Path
) -> None:
    lora.write_gguf(lora.open_adapter(folder()), model, tmp_path / "a.gguf")
    arrays = _written(tmp_path / "a.gguf")[1]
    change = arrays["blk.0.attn_k.weight.lora_b"] @ arrays["blk.0.attn_k.weight.lora_a"]
    # Heads of 4 rows: llama.cpp keeps row 0 beside row 2, transformers beside row 1.
    order = [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_allclose(change, _change(K)[order], atol=1e-5)


def test_a_kept_adapter_scales_each_weight_as_the_merged_one(
    folder: Callable[..., Path], model: ModelSource, tmp_path: Path
) -> None:
    adapter = lora.open_adapter(folder(use_rslora=True, alpha_pattern={"k_proj": 3}))
    lora.write_gguf(adapter, model, tmp_path / "a.gguf")
    header, arrays = _written(tmp_path / "a.gguf")
    engine_scale = header.metadata["adapter.lora.alpha"] / RANK
    for module, name, shape in (
        (Q, "blk.0.attn_q.weight", (WIDTH, WIDTH)),
        (K, "blk.0.attn_k.weight", (KV_WIDTH, WIDTH)),
    ):
        kept = engine_scale * (arrays[f"{name}.lora_b"] @ arrays[f"{name}.lora_a"])
        merged = adapter.patch(f"{module}.weight", np.zeros(shape, np.float32))
        np.testing.assert_allclose(np.sort(kept, axis=0), np.sort(merged, axis=0), atol=1e-5)


def test_the_same_adapter_gives_the_same_bytes(
    folder: Callable[..., Path], model: ModelSource, tmp_path: Path
) -> None:
    adapter = lora.open_adapter(folder())
    for name in ("one.gguf", "two.gguf"):
        lora.write_gguf(adapter, model, tmp_path / name)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


# What is refused


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"megatron_config": {"size": 2}}, "megatron_config"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"some_idea_of_next_year": 7}, "some_idea_of_next_year"),
        ({"alpha_pattern": {"(a|a)(a|a)+": 3}}, "more than a name"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_the_name_of_its_key(
    folder: Callable[..., Path], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(words)) as caught:
        lora.open_adapter(folder(**config))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": None}, "'r' must be a rank"),
        ({"r": 0}, "'r' must be a rank"),
        ({"r": True}, "'r' must be a rank"),
        ({"r": 8}, "not the rank 8"),
        ({"lora_alpha": 0}, "'lora_alpha' must be an alpha"),
        ({"lora_alpha": "8"}, "'lora_alpha' must be an alpha"),
        ({"use_rslora": "yes"}, "'use_rslora' must be true or false"),
        ({"rank_pattern": ["q_proj"]}, "'rank_pattern' must be an object"),
        ({"rank_pattern": {"q_proj": 2}}, "not the rank 2"),
        ({"alpha_pattern": {"k_proj": -1}}, "'k_proj' must be an alpha"),
        ({"alpha_pattern": {"k_proj\\": 1}}, "'alpha_pattern' pattern"),
    ],
)
def test_a_config_with_bad_values_is_refused(
    folder: Callable[..., Path], config: dict[str, Any], words: str
) -> None:
    with pytest.raises(SourceError, match=re.escape(words)):
        lora.open_adapter(folder(**config))


@pytest.mark.parametrize("text", ["", "[1]", '{"r": 4, "r": 8}', '{"r": NaN}', "[" * 90_000])
def test_a_config_that_is_no_strict_json_object_is_refused(
    folder: Callable[..., Path], text: str
) -> None:
    path = folder()
    (path / lora.CONFIG).write_text(text)
    with pytest.raises(SourceError, match=r"adapter_config\.json"):
        lora.open_adapter(path)


@pytest.mark.parametrize(
    "config",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil.module"}},
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "transformers.evil"}},
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"trust_remote_code": True},
        {"custom_module": "evil.py"},
    ],
)
def test_a_config_that_names_code_is_refused(
    folder: Callable[..., Path], config: dict[str, Any]
) -> None:
    with pytest.raises(UnsafeModelError):
        lora.open_adapter(folder(**config))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "a LoRA of an embedding"),
        (f"base_model.model.{Q}.lora_magnitude_vector", "a DoRA magnitude"),
        (f"base_model.model.{Q}.lora_B.bias", "a LoRA with a bias"),
        ("base_model.model.score.weight", "no LoRA matrix"),
        (f"{Q}.lora_A.weight", "no LoRA matrix"),
    ],
)
def test_a_tensor_that_is_no_matrix_of_a_linear_layer_is_refused_by_name(
    folder: Callable[..., Path], name: str, words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=re.escape(words)) as caught:
        lora.open_adapter(folder({**PLAIN, name: _random(RANK, WIDTH)}))
    assert name.removeprefix("base_model.model.") in caught.value.message


@pytest.mark.parametrize(
    "array", [np.ones((RANK, WIDTH), np.int8), np.ones(RANK, np.float32), np.ones((1, 2, 3))]
)
def test_matrices_of_another_type_or_dimension_are_refused_by_name(
    folder: Callable[..., Path], array: NDArray[Any]
) -> None:
    name = f"base_model.model.{Q}.lora_A.weight"
    with pytest.raises(UnsupportedModelError, match=re.escape(name)):
        lora.open_adapter(folder({**PLAIN, name: array}))


def test_half_a_pair_is_refused_by_name(folder: Callable[..., Path]) -> None:
    alone = {name: value for name, value in PLAIN.items() if name != _b_of(Q)}
    with pytest.raises(SourceError, match=rf"only lora_A of '{Q}'"):
        lora.open_adapter(folder(alone))


def test_values_that_are_not_finite_are_refused_by_name(folder: Callable[..., Path]) -> None:
    broken = _random(WIDTH, RANK)
    broken[3, 1] = np.nan
    adapter = lora.open_adapter(folder({**PLAIN, _b_of(Q): broken}))
    with pytest.raises(SourceError, match=rf"{Q}\.lora_B\.weight.*not finite"):
        adapter.patch(f"{Q}.weight", _random(WIDTH, WIDTH))


def test_an_adapter_of_this_model_passes_the_check(
    folder: Callable[..., Path], model: ModelSource
) -> None:
    lora.open_adapter(folder()).check(model)


def test_matrices_for_tensors_that_the_model_lacks_are_an_error(
    folder: Callable[..., Path], model: ModelSource
) -> None:
    more = {
        **PLAIN,
        **_matrices("model.layers.7.self_attn.q_proj", WIDTH),
        **_matrices("model.layers.8.self_attn.q_proj", WIDTH),
    }
    adapter = lora.open_adapter(folder(more))
    with pytest.raises(SourceError, match=r"layers\.7\.self_attn\.q_proj' and 1 more"):
        adapter.check(model)


def test_a_change_of_another_shape_is_an_error_that_names_the_tensor(
    folder: Callable[..., Path], model: ModelSource
) -> None:
    adapter = lora.open_adapter(folder({**PLAIN, **_matrices(K, WIDTH)}))
    words = re.escape(f"'{K}' as a [16, 16] matrix, but the model's is [8, 16]")
    with pytest.raises(SourceError, match=words):
        adapter.check(model)
    with pytest.raises(SourceError, match=words):
        adapter.patch(f"{K}.weight", _random(KV_WIDTH, WIDTH))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_embedding_that_came_along_unchanged_is_no_reason_to_refuse(
    folder: Callable[..., Path], tmp_path: Path, dtype: type
) -> None:
    """PEFT saves whole embeddings and heads when one of them was a target."""
    embedding = _random(32, WIDTH).astype(np.float16)
    tensors = {
        "model.embed_tokens.weight": embedding,
        f"{Q}.weight": _random(WIDTH, WIDTH),
        f"{K}.weight": _random(KV_WIDTH, WIDTH),
    }
    model = _model(tmp_path / "model", "llama", LLAMA, tensors)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    lora.open_adapter(folder({**PLAIN, name: embedding.astype(dtype)})).check(model)


def test_an_embedding_of_the_adapter_s_own_is_refused(
    folder: Callable[..., Path], model: ModelSource
) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    for other in (_random(33, WIDTH), _random(32, WIDTH) + 1):
        adapter = lora.open_adapter(folder({**PLAIN, name: other}))
        with pytest.raises(UnsupportedModelError, match="'embed_tokens' of its own"):
            adapter.check(model)


def test_a_square_layer_is_never_merged_the_wrong_way_round(
    folder: Callable[..., Path], model: ModelSource, tmp_path: Path
) -> None:
    """The shapes of a square layer fit both ways: only the family knows."""
    llama = lora.open_adapter(folder(_matrices(Q, WIDTH), fan_in_fan_out=True))
    with pytest.raises(SourceError, match="fan_in_fan_out=true"):
        llama.check(model)
    name = "transformer.h.0.attn.c_proj"
    config = {"n_layer": 1, "n_embd": WIDTH, "n_head": 2, "vocab_size": 32}
    gpt2 = _model(tmp_path / "gpt2", "gpt2", config, {f"{name}.weight": _random(WIDTH, WIDTH)})
    lora.open_adapter(folder(_matrices(name, WIDTH), fan_in_fan_out=True)).check(gpt2)
    with pytest.raises(SourceError, match="fan_in_fan_out=false"):
        lora.open_adapter(folder(_matrices(name, WIDTH))).check(gpt2)


def test_pickled_adapters_are_never_opened(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / lora.WEIGHTS).rename(path / "adapter_model.bin")
    with pytest.raises(UnsafeModelError, match=r"adapter_model\.bin") as caught:
        lora.open_adapter(path)
    assert "safetensors" in (caught.value.hint or "")


def test_a_pickle_under_the_name_of_safetensors_is_refused(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / lora.WEIGHTS).write_bytes(b"\x80\x04\x95" + bytes(64))
    with pytest.raises(UnsafeModelError, match="pickle"):
        lora.open_adapter(path)


def test_a_link_inside_the_folder_is_refused(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder()
    moved = (path / lora.WEIGHTS).rename(tmp_path / "elsewhere.safetensors")
    (path / lora.WEIGHTS).symlink_to(moved)
    with pytest.raises(UnsafeModelError, match="symbolic link"):
        lora.open_adapter(path)


@pytest.mark.parametrize("missing", [lora.CONFIG, lora.WEIGHTS])
def test_a_folder_without_one_of_its_files_is_refused(
    folder: Callable[..., Path], missing: str
) -> None:
    path = folder()
    (path / missing).unlink()
    with pytest.raises(SourceError, match=missing):
        lora.open_adapter(path)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no folder"):
        lora.open_adapter(tmp_path / "nothing")


def test_every_truncation_of_the_weights_is_one_clear_error(folder: Callable[..., Path]) -> None:
    path = folder()
    whole = (path / lora.WEIGHTS).read_bytes()
    assert load_file(path / lora.WEIGHTS)
    for length in range(0, len(whole), 37):
        (path / lora.WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(EdgekitError) as caught:
            lora.open_adapter(path)
        assert isinstance(caught.value, SourceError)


def _b_of(module: str) -> str:
    return f"base_model.model.{module}.lora_B.weight"
