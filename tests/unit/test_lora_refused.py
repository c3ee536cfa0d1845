"""What is no plain LoRA of this model is refused by name before anything is written."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lora_folder
import numpy as np
import pytest
from lora_folder import KV_WIDTH, PLAIN, RANK, TENSORS, WIDTH, K, Q, matrices, noise
from numpy.typing import NDArray
from safetensors.numpy import load_file

from edgekit.errors import EdgekitError, SourceError, UnsafeModelError, UnsupportedModelError
from edgekit.exporters import lora
from edgekit.source import ModelSource


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes an adapter folder: ``folder(tensors, r=8)``."""
    return partial(lora_folder.write, tmp_path / "adapter")


@pytest.fixture
def model(tmp_path: Path) -> ModelSource:
    return lora_folder.write_model(tmp_path / "model")


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
        lora.open_adapter(folder({**PLAIN, name: noise(RANK, WIDTH)}))
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
    broken = noise(WIDTH, RANK)
    broken[3, 1] = np.nan
    adapter = lora.open_adapter(folder({**PLAIN, _b_of(Q): broken}))
    with pytest.raises(SourceError, match=rf"{Q}\.lora_B\.weight.*not finite"):
        adapter.patch(f"{Q}.weight", noise(WIDTH, WIDTH))


def test_an_adapter_of_this_model_passes_the_check(
    folder: Callable[..., Path], model: ModelSource
) -> None:
    lora.open_adapter(folder()).check(model)


def test_matrices_for_tensors_that_the_model_lacks_are_an_error(
    folder: Callable[..., Path], model: ModelSource
) -> None:
    more = {
        **PLAIN,
        **matrices("model.layers.7.self_attn.q_proj", WIDTH),
        **matrices("model.layers.8.self_attn.q_proj", WIDTH),
    }
    adapter = lora.open_adapter(folder(more))
    with pytest.raises(SourceError, match=r"layers\.7\.self_attn\.q_proj' and 1 more"):
        adapter.check(model)


def test_a_change_of_another_shape_is_an_error_that_names_the_tensor(
    folder: Callable[..., Path], model: ModelSource
) -> None:
    adapter = lora.open_adapter(folder({**PLAIN, **matrices(K, WIDTH)}))
    words = re.escape(f"'{K}' as a [16, 16] matrix, but the model's is [8, 16]")
    with pytest.raises(SourceError, match=words):
        adapter.check(model)
    with pytest.raises(SourceError, match=words):
        adapter.patch(f"{K}.weight", noise(KV_WIDTH, WIDTH))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_embedding_that_came_along_unchanged_is_no_reason_to_refuse(
    folder: Callable[..., Path], tmp_path: Path, dtype: type
) -> None:
    """PEFT saves whole embeddings and heads when one of them was a target."""
    embedding = noise(32, WIDTH).astype(np.float16)
    tensors = {**TENSORS, "model.embed_tokens.weight": embedding}
    model = lora_folder.write_model(tmp_path / "model", tensors)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    lora.open_adapter(folder({**PLAIN, name: embedding.astype(dtype)})).check(model)


def test_an_embedding_of_the_adapter_s_own_is_refused(
    folder: Callable[..., Path], model: ModelSource
) -> None:
    name = "base_model.model.model.embed_tokens.weight"
    for other in (noise(33, WIDTH), noise(32, WIDTH) + 1):
        adapter = lora.open_adapter(folder({**PLAIN, name: other}))
        with pytest.raises(UnsupportedModelError, match="'embed_tokens' of its own"):
            adapter.check(model)


def test_a_square_layer_is_never_merged_the_wrong_way_round(
    folder: Callable[..., Path], model: ModelSource, tmp_path: Path
) -> None:
    """The shapes of a square layer fit both ways: only the family knows."""
    llama = lora.open_adapter(folder(matrices(Q, WIDTH), fan_in_fan_out=True))
    with pytest.raises(SourceError, match="fan_in_fan_out=true"):
        llama.check(model)
    name = "transformer.h.0.attn.c_proj"
    config = {"n_layer": 1, "n_embd": WIDTH, "n_head": 2, "vocab_size": 32}
    weight = {f"{name}.weight": noise(WIDTH, WIDTH)}
    gpt2 = lora_folder.write_model(tmp_path / "gpt2", weight, family="gpt2", config=config)
    lora.open_adapter(folder(matrices(name, WIDTH), fan_in_fan_out=True)).check(gpt2)
    with pytest.raises(SourceError, match="fan_in_fan_out=false"):
        lora.open_adapter(folder(matrices(name, WIDTH))).check(gpt2)


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


def test_a_sound_header_is_never_taken_for_a_pickle(folder: Callable[..., Path]) -> None:
    """The length of a header comes first in the file: 0x0380 begins as a pickle of protocol 3."""
    path = folder()
    data = (path / lora.WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].ljust(0x0380)
    (path / lora.WEIGHTS).write_bytes(b"\x80\x03".ljust(8, b"\0") + header + data[8 + length :])
    assert lora.open_adapter(path).alpha == 8


def test_a_family_without_a_row_is_no_error_of_usage(
    folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = lora_folder.write_model(tmp_path / "other", family="mamba2")
    adapter = lora.open_adapter(folder())
    for use in (adapter.check, partial(lora.write_gguf, adapter, out=tmp_path / "a.gguf")):
        with pytest.raises(UnsupportedModelError, match="mamba2"):
            use(model)
    assert not (tmp_path / "a.gguf").exists()


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
