"""A LoRA that PEFT made answers in llama.cpp as it does in PEFT, merged in or kept beside."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgekit.errors import RecipeError, SourceError
from edgekit.export_again import reprove
from edgekit.exporter import export
from edgekit.exporters import hf_to_gguf, lora
from edgekit.llama_library import libllama
from edgekit.receipt import Receipt
from edgekit.source import ModelSource
from edgekit.source import source as open_source

peft = pytest.importorskip("peft")

TOLERANCE = 2e-3
IDS = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46, 26, 43, 38, 32, 79, 50]


class Trained(NamedTuple):
    """A model folder, an adapter folder, and PEFT's own logits with and without the adapter."""

    source: ModelSource
    adapter: Path
    plain: NDArray[np.float32]
    changed: NDArray[np.float32]


def _save_tokenizer(folder: Path) -> int:
    """Byte-level BPE with a single merge; the number of its tokens."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    return len(fast)


def _llama(vocab_size: int) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2(vocab_size: int) -> transformers.PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_embd=64, n_layer=2, n_head=4, n_positions=128
    )
    return transformers.GPT2LMHeadModel(config)


LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Callable[[int], Any], dict[str, Any]]] = {
    "llama": (_llama, {"target_modules": [*LLAMA_LINEAR, "lm_head"]}),
    "llama with patterns and rsLoRA": (
        _llama,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"k_proj": 2, "layers.0.mlp.down_proj": 6},
            "alpha_pattern": {"down_proj": 3, "^model.layers.1.self_attn.q_proj": 5},
        },
    ),
    "gpt2": (_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


def _make(name: str, folder: Path) -> Trained:
    build, settings = CASES[name]
    torch.manual_seed(7)
    model = build(_save_tokenizer(folder / "model")).eval()
    model.save_pretrained(folder / "model")
    plain = _torch_logits(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    with torch.no_grad():
        for key, value in wrapped.named_parameters():
            if ".lora_" in key:  # PEFT starts with B = 0, which changes nothing
                value.normal_(std=0.2)
    wrapped.save_pretrained(folder / "adapter")
    changed = _torch_logits(wrapped.merge_and_unload())
    return Trained(open_source(folder / "model"), folder / "adapter", plain, changed)


@pytest.fixture(scope="module", params=list(CASES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return _make(request.param, tmp_path_factory.mktemp("trained"))


def _torch_logits(model: Any) -> NDArray[np.float32]:
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


def _logits(model: Path, adapter: Path | None = None) -> NDArray[np.float32]:
    """llama.cpp's logits after each of IDS, float32 [tokens, vocabulary]."""
    llama = libllama()
    loaded = llama.llama_model_load_from_file(
        str(model).encode(), llama.llama_model_default_params()
    )
    assert loaded
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    params.type_k = params.type_v = 0  # an F32 cache, which flash attention does not take
    params.flash_attn_type = 0
    context = llama.llama_init_from_model(loaded, params)
    try:
        if adapter:
            opened = llama.llama_adapter_lora_init(loaded, str(adapter).encode())
            assert opened
            adapters = (llama.llama_adapter_lora_p_ctypes * 1)(opened)
            assert llama.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1)) == 0
        width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(loaded))
        rows = []
        for token in IDS:
            batch = llama.llama_batch_get_one((llama.llama_token * 1)(token), 1)
            assert llama.llama_decode(context, batch) == 0
            found = llama.llama_get_logits_ith(context, -1)
            rows.append(np.ctypeslib.as_array(found, (width,)).copy())
    finally:
        llama.llama_free(context)
        llama.llama_model_free(loaded)
    return np.stack(rows)


def _assert_same(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert float(np.abs(found - expected).max()) <= TOLERANCE
    np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))


def _export(trained: Trained, out: Path, adapter: lora.Adapter | None = None) -> Path:
    hf_to_gguf.write(trained.source, out, "F32", patch=adapter.patch if adapter else None)
    return out


def test_the_adapters_here_change_the_answers_by_far_more_than_the_tolerance(
    trained: Trained,
) -> None:
    assert np.abs(trained.changed - trained.plain).max() > 100 * TOLERANCE


def test_a_merged_export_answers_as_peft_does(trained: Trained, tmp_path: Path) -> None:
    adapter = lora.open_adapter(trained.adapter)
    adapter.check(trained.source)
    merged = _export(trained, tmp_path / "merged.gguf", adapter)
    _assert_same(_logits(merged), trained.changed)


def test_a_kept_adapter_answers_as_the_merged_model_does(trained: Trained, tmp_path: Path) -> None:
    adapter = lora.open_adapter(trained.adapter)
    plain = _export(trained, tmp_path / "plain.gguf")
    merged = _export(trained, tmp_path / "merged.gguf", adapter)
    lora.write_gguf(adapter, trained.source, tmp_path / "adapter.gguf")
    _assert_same(_logits(plain), trained.plain)
    _assert_same(_logits(plain, tmp_path / "adapter.gguf"), _logits(merged))


@pytest.mark.parametrize("mode", ["merge", "keep"])
def test_an_artifact_with_an_adapter_answers_as_peft_does(
    trained: Trained, tmp_path: Path, mode: str
) -> None:
    artifact = export(
        trained.source,
        out=tmp_path / "out",
        type="F32",
        adapter=trained.adapter,
        adapter_mode=mode,
        receipt=False,
    )
    artifact.verify()
    kept = artifact.path / "adapter.gguf"
    assert kept.exists() == (mode == "keep")
    _assert_same(_logits(artifact.model_path, kept if mode == "keep" else None), trained.changed)
    assert artifact.manifest.recipe.adapter == lora.open_adapter(trained.adapter).sha256


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_a_merged_adapter_is_in_the_float_model_too(trained: Trained, tmp_path: Path) -> None:
    artifact = export(trained.source, out=tmp_path / "out", type="Q8_0", adapter=trained.adapter)
    quality = Receipt.from_dict(artifact.receipt).quality
    assert quality and quality.mean_kl.value < 0.02
    with pytest.raises(RecipeError, match="made with another adapter"):
        reprove(artifact)
    now, differing = reprove(artifact, adapter=trained.adapter)
    assert now.to_dict()["quality"] == artifact.receipt["quality"] and differing == []


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_a_kept_adapter_is_loaded_and_in_no_other_figure(trained: Trained, tmp_path: Path) -> None:
    artifact = export(
        trained.source,
        out=tmp_path / "out",
        type="Q8_0",
        adapter=trained.adapter,
        adapter_mode="keep",
    )
    receipt = Receipt.from_dict(artifact.receipt)
    assert receipt.quality and receipt.quality.mean_kl.value < 0.02
    assert any("adapter" in warning for warning in receipt.warnings)
    assert reprove(artifact)[1] == []


def test_an_adapter_of_another_model_is_refused_before_anything_is_written(
    trained: Trained, tmp_path: Path
) -> None:
    other = transformers.LlamaConfig(
        vocab_size=trained.plain.shape[1],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    _save_tokenizer(tmp_path / "other")
    transformers.LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(SourceError, match="the adapter changes"):
        export(tmp_path / "other", out=tmp_path / "out", type="F32", adapter=trained.adapter)
    assert {path.name for path in tmp_path.iterdir()} == {"other"}
