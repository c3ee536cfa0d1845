"""Small real models of every family: transformers' own classes, the family's own tokenizer.

Weights are random and wide, so that a wrong permutation, base or norm moves the logits far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_tokenizers import TOKENIZERS


def _shape(**changed: Any) -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        **changed,
    }


# Name -> (transformers' class, tokenizer, what the config says beyond the vocabulary's size).
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2": ("Llama", "llama2", _shape(rms_norm_eps=1e-5)),
    "tinyllama": ("Llama", "llama2-json", _shape(rms_norm_eps=1e-5)),
    "llama3": (
        "Llama",
        "llama3",
        _shape(
            tie_word_embeddings=True,
            head_dim=32,
            max_position_embeddings=8192,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
    ),
    "llama-linear": (
        "Llama",
        "gpt2",
        _shape(
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        ),
    ),
    "mixtral": (
        "Mixtral",
        "gpt2",
        _shape(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    ),
    "qwen2": ("Qwen2", "qwen2", _shape(tie_word_embeddings=True, rope_theta=1e6)),
    "qwen3": ("Qwen3", "qwen2", _shape(head_dim=32)),
    "phi": (
        "Phi",
        "phi2",
        _shape(num_key_value_heads=4, partial_rotary_factor=0.5),
    ),
    "phi3": ("Phi3", "phi3", _shape(sliding_window=128, original_max_position_embeddings=256)),
    "phi3-long": (
        "Phi3",
        "phi3",
        _shape(
            max_position_embeddings=1024,
            original_max_position_embeddings=256,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "long_factor": [1.0 + 0.7 * i for i in range(8)],
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "original_max_position_embeddings": 256,
            },
        ),
    ),
    "gemma3": (
        "Gemma3",
        "gemma3",
        _shape(
            num_hidden_layers=7,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=16,
        ),
    ),
    "gpt2": (
        "GPT2",
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_ctx": 256},
    ),
}


# The models that a GGUF file gives back, with what changes: the trained length of Llama 3 in
# particular, which such a file cannot hold.
CONVERTIBLE: dict[str, dict[str, Any]] = {
    "llama2": {},
    "llama3": {
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-linear": {},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
    "phi": {},
    "phi3": {},
    "phi3-long": {},
    "gemma3": {},
}


def _weights(model: Any, embedding_width: float) -> None:
    """Wide weights, norms near 1, biases that matter."""
    import torch

    generator = torch.Generator().manual_seed(20)
    for name, parameter in model.named_parameters():
        bias, norm = name.endswith("bias"), "norm" in name or "ln_" in name
        width = embedding_width if "embed_tokens" in name else 0.3
        with torch.no_grad():
            parameter.normal_(
                1.0 if norm and not bias else 0.0,
                0.1 if norm or bias else width,
                generator=generator,
            )


def make(
    name: str,
    folder: Path,
    *,
    dtype: str = "float32",
    shard_bytes: int | None = None,
    **changed: Any,
) -> Path:
    """A Hugging Face folder of the model called ``name`` in ``MODELS``, with its tokenizer.

    ``changed`` replaces settings of its config; ``shard_bytes`` splits the weights into files.
    """
    import torch
    import transformers

    kind, tokenizer, settings = MODELS[name]
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = TOKENIZERS[tokenizer](folder)
    config_class = getattr(
        transformers, f"{kind.replace('3', '3Text') if kind == 'Gemma3' else kind}Config"
    )
    config = config_class(**{"vocab_size": vocab_size, **settings, **changed})
    model_class = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM"))
    model = model_class(config)
    # llama.cpp's GELU is a table of 16-bit floats. Gemma's norms hand the error of seven layers to
    # the logits in full; its embedding, which is its output too, keeps them small.
    _weights(model, 0.05 if kind == "Gemma3" else 0.3)
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size=shard_bytes or "5GB", safe_serialization=True
    )
    return folder
