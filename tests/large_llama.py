"""A folder with TinyLlama's shapes and random weights: 1.1 B parameters."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import numpy as np
import tiny_tokenizers

LAYERS, WIDTH, FFN, KV, VOCAB = 22, 2048, 5632, 256, 32000


def shapes() -> dict[str, tuple[int, ...]]:
    """TinyLlama-1.1B's tensors (github.com/jzhang38/TinyLlama, config.json)."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        found |= {
            f"{name}input_layernorm.weight": (WIDTH,),
            f"{name}post_attention_layernorm.weight": (WIDTH,),
            f"{name}self_attn.q_proj.weight": (WIDTH, WIDTH),
            f"{name}self_attn.k_proj.weight": (KV, WIDTH),
            f"{name}self_attn.v_proj.weight": (KV, WIDTH),
            f"{name}self_attn.o_proj.weight": (WIDTH, WIDTH),
            f"{name}mlp.gate_proj.weight": (FFN, WIDTH),
            f"{name}mlp.up_proj.weight": (FFN, WIDTH),
            f"{name}mlp.down_proj.weight": (WIDTH, FFN),
        }
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def make(folder: Path) -> Path:
    """TinyLlama's config and tokenizer with random bfloat16 weights, 2.2 GB."""
    folder.mkdir()
    tiny_tokenizers.TOKENIZERS["llama2"](folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in shapes().items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes().values():
            left = 2 * prod(shape)
            while left:
                left -= file.write(block[:left])
    return folder
