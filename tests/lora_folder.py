"""LoRA folders as PEFT writes them, and the small models that they are for.

For tests of what is merged and what is refused; adapters that PEFT trained are in integration.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from edgekit.exporters import lora
from edgekit.source import ModelSource, source

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


def noise(*shape: int) -> NDArray[np.float32]:
    """Values that the shape alone decides."""
    seed = np.random.default_rng(list(shape))
    return seed.standard_normal(shape).astype(np.float32)


def matrices(module: str, out: int, inner: int = WIDTH, rank: int = RANK) -> Arrays:
    """A and B of one layer, by PEFT's names."""
    return {
        f"base_model.model.{module}.lora_A.weight": noise(rank, inner),
        f"base_model.model.{module}.lora_B.weight": noise(out, rank),
    }


PLAIN = {**matrices(Q, WIDTH), **matrices(K, KV_WIDTH)}
TENSORS = {
    "model.embed_tokens.weight": noise(32, WIDTH),
    f"{Q}.weight": noise(WIDTH, WIDTH),
    f"{K}.weight": noise(KV_WIDTH, WIDTH),
}


def write(folder: Path, tensors: Arrays = PLAIN, **config: Any) -> Path:
    """An adapter in ``folder``; a key of its config set to None is left out."""
    folder.mkdir(exist_ok=True)
    body = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / lora.CONFIG).write_text(json.dumps(body))
    save_file(tensors, folder / lora.WEIGHTS)
    return folder


def write_model(
    folder: Path,
    tensors: Arrays = TENSORS,
    *,
    family: str = "llama",
    config: dict[str, Any] = LLAMA,
) -> ModelSource:
    """A model; by default the part of a llama that ``PLAIN`` is for: 4 query and 2 key heads."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family, **config}))
    save_file(tensors, folder / "model.safetensors")
    return source(folder)
