"""Hugging Face folders written by hand: any config, any tensors, a vocabulary of bytes.

For tests of what is refused and of how bytes move; models that must compute are in ``tiny``.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, WIDTH, VOCAB = 2, 8, 260
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
}
_TYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int8": "I8"}


def llama_tensors(dtype: Any = np.float32) -> dict[str, np.ndarray[Any, Any]]:
    """Random weights of a two-layer llama; uint16 stands for the bits of bfloat16."""
    rng = np.random.default_rng(3)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in (
                ("input_layernorm", (WIDTH,)),
                ("post_attention_layernorm", (WIDTH,)),
                ("self_attn.q_proj", (WIDTH, WIDTH)),
                ("self_attn.k_proj", (WIDTH // 2, WIDTH)),
                ("self_attn.v_proj", (WIDTH // 2, WIDTH)),
                ("self_attn.o_proj", (WIDTH, WIDTH)),
                ("mlp.gate_proj", (16, WIDTH)),
                ("mlp.up_proj", (16, WIDTH)),
                ("mlp.down_proj", (WIDTH, 16)),
            )
        }
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if dtype is np.uint16:
        return {name: (v.view(np.uint32) >> 16).astype(np.uint16) for name, v in values.items()}
    return {name: v.astype(dtype) for name, v in values.items()}


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json that splits like GPT-2's, with 256 byte tokens, two merges, two specials."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + at) for at in range(len(others))]
    vocab = {letter: index for index, letter in enumerate([*letters, "he", "llo"])}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 258, "content": "<|end|>", "special": True, **special},
            {"id": 259, "content": "[tool]", "special": False, **special},
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": ["h e", "l lo"]},
    }


def write_safetensors(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    """The format's few bytes: a length, a JSON header, the data."""
    header, at = {}, 0
    for name, values in tensors.items():
        span = [at, at + values.nbytes]
        header[name] = {
            "dtype": _TYPES[str(values.dtype)],
            "shape": list(values.shape),
            "data_offsets": span,
        }
        at = span[1]
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for values in tensors.values():
            file.write(values.tobytes())


def make(
    folder: Path,
    *,
    config: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray[Any, Any]] | None = None,
    tokenizer: dict[str, Any] | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """A folder; what is not given is the two-layer llama. A value of None removes a config key."""
    folder.mkdir(parents=True)
    settings = {k: v for k, v in (LLAMA | (config or {})).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or byte_tokenizer()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", **(tokenizer_config or {})})
    )
    tensors = llama_tensors() if tensors is None else tensors
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names, places = sorted(tensors), {}
    for shard in range(shards):
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        write_safetensors(folder / file_name, part)
        places |= dict.fromkeys(part, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder
