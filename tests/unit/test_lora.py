"""A LoRA folder is merged exactly, and kept for llama.cpp with the same effect."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lora_folder
import numpy as np
import pytest
from lora_folder import CONFIG, KV_WIDTH, PLAIN, RANK, WIDTH, Arrays, K, Q, matrices, noise
from numpy.typing import NDArray

from edgekit.exporters import lora
from edgekit.formats import gguf
from edgekit.source import ModelSource


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes an adapter folder: ``folder(tensors, r=8)``."""
    return partial(lora_folder.write, tmp_path / "adapter")


@pytest.fixture
def model(tmp_path: Path) -> ModelSource:
    return lora_folder.write_model(tmp_path / "model")


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
    weight = noise(KV_WIDTH, WIDTH)
    merged = lora.open_adapter(folder()).patch(f"{K}.weight", weight)
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged, weight + 8 / RANK * _change(K), atol=1e-5)


def test_a_tensor_that_the_adapter_does_not_change_comes_back_as_the_same_object(
    folder: Callable[..., Path],
) -> None:
    adapter = lora.open_adapter(folder())
    weight = noise(WIDTH, WIDTH)
    for name in (f"{Q}.bias", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        assert adapter.patch(name, weight) is weight


def test_the_weight_that_is_given_stays_as_it_was(folder: Callable[..., Path]) -> None:
    weight = noise(WIDTH, WIDTH)
    before = weight.copy()
    lora.open_adapter(folder()).patch(f"{Q}.weight", weight)
    np.testing.assert_array_equal(weight, before)


def test_rslora_divides_by_the_root_of_the_rank(folder: Callable[..., Path]) -> None:
    adapter = lora.open_adapter(folder(use_rslora=True))
    assert _scale(adapter, Q, (WIDTH, WIDTH)) == pytest.approx(8 / math.sqrt(RANK), rel=1e-5)


def test_patterns_give_single_modules_a_rank_and_an_alpha_of_their_own(
    folder: Callable[..., Path],
) -> None:
    tensors = {**matrices(Q, WIDTH), **matrices(K, KV_WIDTH, rank=2)}
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
    tensors = matrices(module, 3 * WIDTH)
    adapter = lora.open_adapter(folder(tensors, fan_in_fan_out=True))
    merged = adapter.patch(f"{module}.weight", np.zeros((WIDTH, 3 * WIDTH), np.float32))
    np.testing.assert_allclose(merged, 2 * _change(module, tensors).T, atol=1e-5)


@pytest.mark.parametrize("name", [f"{K}.weight", f"{K}.weight".removeprefix("model.")])
def test_a_folder_that_names_its_tensors_without_the_head_is_merged_too(
    folder: Callable[..., Path], name: str
) -> None:
    weight = noise(KV_WIDTH, WIDTH)
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
