"""From a Hugging Face folder to float GGUF: which bytes, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hf_folder
import numpy as np
import pytest
from hf_folder import LLAMA, byte_tokenizer, llama_tensors

from edgekit.errors import (
    EdgekitError,
    ExportError,
    SourceError,
    UnsupportedModelError,
)
from edgekit.exporters import hf_to_gguf, hf_weights
from edgekit.exporters.arch.rope import attention_factor
from edgekit.formats import gguf
from edgekit.source import ModelSource, source


def written(folder: Path, dtype: str = "F32", **options: Any) -> bytes:
    out = folder.with_suffix(".gguf")
    hf_to_gguf.write(source(folder), out, dtype, **options)
    return out.read_bytes()


def header(folder: Path, dtype: str = "F32") -> gguf.GgufHeader:
    written(folder, dtype)
    return gguf.read(folder.with_suffix(".gguf"))


def values(folder: Path, name: str, dtype: str = "F32") -> np.ndarray[Any, Any]:
    data = written(folder, dtype)
    tensor = gguf.read(folder.with_suffix(".gguf")).tensor(name)
    stored = hf_weights.stored_type(tensor.type)
    raw = data[tensor.offset : tensor.offset + tensor.size_bytes]
    return np.frombuffer(raw, stored).reshape(tensor.shape[::-1])


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = hf_folder.make(tmp_path / "model")
    assert written(folder) == written(folder)


def test_shards_give_the_bytes_of_one_file(tmp_path: Path) -> None:
    one = hf_folder.make(tmp_path / "one")
    three = hf_folder.make(tmp_path / "three", shards=3)
    assert written(one) == written(three)


def test_both_ways_to_write_a_rope_give_the_same_bytes(tmp_path: Path) -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **scaling}}
    old = {
        "rope_parameters": None,
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", **scaling},
    }
    both = new | old | {"rope_parameters": new["rope_parameters"]}
    files = [
        written(hf_folder.make(tmp_path / name, config=config))
        for name, config in (("new", new), ("old", old), ("both", both))
    ]
    assert files[0] == files[1] == files[2]
    assert files[0] != written(hf_folder.make(tmp_path / "plain"))


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            "rope_scaling": {"type": "linear", "factor": 4.0},
        },
    ],
)
def test_a_rope_that_contradicts_itself_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="contradicts itself"):
        written(hf_folder.make(tmp_path / "model", config=config))


ROPE = LLAMA["rope_parameters"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "mamba2"}, "mamba2"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config|awq"),
        ({"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {**ROPE, "rope_type": "linear", "mscale": 2.0}}, "mscale"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "phi", "qk_layernorm": True, "hidden_act": "gelu_new"}, "qk_layernorm"),
        ({"model_type": "phi3", "rope_parameters": {**ROPE, "rope_type": "yarn"}}, "yarn"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (
            {"model_type": "gemma3_text", "layer_types": ["full_attention"] * 2, "head_dim": 256},
            "every sixth",
        ),
        (
            {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_inner": 9},
            "n_inner",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        written(hf_folder.make(tmp_path / "model", config=config))


@pytest.mark.parametrize("trained_length", [0, 1])
def test_a_trained_length_without_a_logarithm_is_refused(trained_length: int) -> None:
    with pytest.raises(UnsupportedModelError, match="longrope"):
        attention_factor(64, trained_length)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", None),
        ("hidden_size", -8),
        ("hidden_size", "8"),
        ("hidden_size", True),
        ("hidden_size", 2**40),
        ("vocab_size", 1.5),
        ("rms_norm_eps", "small"),
        ("num_attention_heads", 3),
        ("rope_parameters", [1]),
        ("rope_parameters", {"rope_theta": "big"}),
        ("num_hidden_layers", 10_000_000),
    ],
)
def test_a_bad_value_in_the_config_is_a_source_error(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(SourceError):
        written(hf_folder.make(tmp_path / "model", config={key: value}))


@pytest.mark.parametrize(
    "lost",
    ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"],
)
def test_missing_weights_are_seen(tmp_path: Path, lost: str) -> None:
    tensors = llama_tensors()
    del tensors[lost]
    with pytest.raises(SourceError, match="incomplete"):
        written(hf_folder.make(tmp_path / "model", tensors=tensors))


def test_a_missing_output_is_seen_unless_the_embedding_is_the_output(tmp_path: Path) -> None:
    written(hf_folder.make(tmp_path / "tied"))
    with pytest.raises(SourceError, match=r"output\.weight"):
        written(hf_folder.make(tmp_path / "untied", config={"tie_word_embeddings": False}))


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"model.layers.0.mlp.mystery.weight": np.zeros((4, 8), np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"mlp\.mystery"):
        written(hf_folder.make(tmp_path / "model", tensors=tensors))


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"model.layers.0.mlp.up_proj.weight": np.zeros((16, 8), np.int8)}
    with pytest.raises(UnsupportedModelError, match="I8"):
        written(hf_folder.make(tmp_path / "model", tensors=tensors))


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    folder = hf_folder.make(tmp_path / "model", shards=2)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps({"weight_map": places | {"model.extra": next(iter(places.values()))}})
    )
    with pytest.raises(SourceError, match=r"model\.extra"):
        written(folder)


def test_a_shard_that_is_cut_short_is_an_error_of_ours(tmp_path: Path) -> None:
    folder = hf_folder.make(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SourceError):
        written(folder)


def test_vectors_and_norms_stay_float32(tmp_path: Path) -> None:
    folder = hf_folder.make(tmp_path / "model", tensors=llama_tensors(np.float16))
    for tensor in header(folder, "BF16").tensors:
        assert tensor.type == ("F32" if "norm" in tensor.name else "BF16")


def test_native_keeps_the_bits_of_every_tensor(tmp_path: Path) -> None:
    tensors = llama_tensors(np.uint16)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = llama_tensors()[name]
    folder = hf_folder.make(tmp_path / "model", tensors=tensors)
    found = header(folder, "native")
    assert found.metadata["general.file_type"] == 32  # mostly BF16
    assert found.tensor("blk.0.ffn_up.weight").type == "F32"
    bits = values(folder, "token_embd.weight", "native")
    assert (bits == tensors["model.embed_tokens.weight"]).all()


def test_bfloat16_is_rounded_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45, 1.00390625], np.float32)
    numbers = np.concatenate([raw[np.isfinite(raw)], special])
    expected = torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (hf_weights.from_float32(numbers, "BF16", "x") == expected).all()
    nan = hf_weights.from_float32(np.array([np.nan], np.float32), "BF16", "x")
    assert np.isnan(hf_weights.to_float32(nan, "BF16")).all()


def test_a_value_beyond_float16_is_refused_not_made_infinite(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 70000
    folder = hf_folder.make(tmp_path / "model", tensors=tensors)
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight.*65504"):
        written(folder, "F16")
    assert values(folder, "blk.1.ffn_up.weight", "F32")[3, 3] == 70000


def test_a_patch_sees_each_source_tensor_whole_in_float32(tmp_path: Path) -> None:
    tensors = llama_tensors(np.float16)
    folder, seen = hf_folder.make(tmp_path / "model", tensors=tensors), {}

    def patch(name: str, found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        seen[name] = (found.dtype, found.shape)
        return found + 1 if name.endswith("layers.0.mlp.up_proj.weight") else found

    written(folder, "F32", patch=patch)
    assert seen == {name: (np.float32, found.shape) for name, found in tensors.items()}
    written(folder, "F32", patch=patch)
    data = folder.with_suffix(".gguf").read_bytes()
    place = gguf.read(folder.with_suffix(".gguf")).tensor("blk.0.ffn_up.weight")
    found = np.frombuffer(data[place.offset :][: place.size_bytes], np.float32).reshape(16, 8)
    assert (found == tensors["model.layers.0.mlp.up_proj.weight"].astype(np.float32) + 1).all()


def test_small_blocks_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_folder.make(tmp_path / "model", tensors=llama_tensors(np.uint16))
    whole = written(folder, "F16")
    monkeypatch.setattr(hf_weights, "BLOCK_BYTES", 1)
    assert written(folder, "F16") == whole


def test_progress_ends_at_the_size_of_all_tensors(tmp_path: Path) -> None:
    folder, heard = hf_folder.make(tmp_path / "model"), []
    written(folder, "F16", progress=lambda *report: heard.append(report))
    total = sum(tensor.size_bytes for tensor in header(folder, "F16").tensors)
    assert heard[-1][1:] == (total, total)
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)


def test_header_only_is_the_same_file_with_a_hole(tmp_path: Path) -> None:
    tensors = llama_tensors()
    folder = hf_folder.make(tmp_path / "model", tensors=tensors)
    whole, hole = written(folder, "F16"), tmp_path / "hole.gguf"
    hf_to_gguf.header_only(source(folder), hole, "F16")
    start = gguf.read(hole).data_offset
    assert hole.stat().st_size == len(whole)
    assert hole.read_bytes()[:start] == whole[:start]
    assert not any(hole.read_bytes()[start:])


STRANGER = """
from edgekit.exporters.arch.llama import Llama

class Stranger(Llama):
    def gguf_name(self, name):
        return super().gguf_name(name.replace("backbone.", "model."))
"""


def test_a_stranger_adds_a_family_from_a_package_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "stranger-1.dist-info").mkdir(parents=True)
    (site / "stranger.py").write_text(STRANGER)
    (site / "stranger-1.dist-info" / "METADATA").write_text("Name: stranger\nVersion: 1\n")
    (site / "stranger-1.dist-info" / "entry_points.txt").write_text(
        "[edgekit.gguf_families]\nstranger = stranger:Stranger\n"
    )
    monkeypatch.syspath_prepend(str(site))
    tensors = {name.replace("model.", "backbone."): v for name, v in llama_tensors().items()}
    folder = hf_folder.make(tmp_path / "model", tensors=tensors, config={"model_type": "stranger"})
    try:
        assert written(folder) == written(hf_folder.make(tmp_path / "llama"))
    finally:
        sys.modules.pop("stranger", None)


def test_no_value_of_the_config_is_believed_blindly(tmp_path: Path) -> None:
    """Every value replaced by another kind of value: our errors only."""
    for at, broken in enumerate(_broken(LLAMA)):
        folder = tmp_path / str(at)
        try:
            written(hf_folder.make(folder, config=broken))
        except EdgekitError:
            continue


def test_no_file_of_the_tokenizer_is_believed_blindly(tmp_path: Path) -> None:
    """Every part replaced by another kind of value: our errors only."""
    for at, broken in enumerate(_broken(byte_tokenizer())):
        folder = hf_folder.make(tmp_path / str(at), tokenizer=broken)
        try:
            written(folder)
        except EdgekitError:
            continue


def _broken(value: Any) -> list[Any]:
    """Copies of a JSON value with one inner value replaced by a number, a text, a list or null."""
    copies: list[Any] = []
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, inner in items[:12]:
        for other in (7, "x", ["x"], {"type": "x"}, None, -1):
            copy = json.loads(json.dumps(value))
            copy[key] = other
            copies.append(copy)
        if isinstance(inner, dict | list) and inner:
            for deeper in _broken(inner):
                copy = json.loads(json.dumps(value))
                copy[key] = deeper
                copies.append(copy)
    return copies


def test_only_a_source_of_the_right_kind_is_given(tmp_path: Path) -> None:
    folder = hf_folder.make(tmp_path / "model")
    found: ModelSource = source(folder)
    with pytest.raises(EdgekitError, match="Q4_0"):
        hf_to_gguf.write(found, tmp_path / "x.gguf", "Q4_0")
