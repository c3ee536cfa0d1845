"""Phi-1, Phi-1.5 and Phi-2: parallel attention and MLP, LayerNorm, heads that turn in part.

Knows their metadata in llama.cpp's words; never opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import gguf

from edgekit.errors import UnsupportedModelError
from edgekit.exporters.arch.decoder import SEPARATE, Decoder
from edgekit.exporters.arch.family import Family, Value


class Phi(Family):
    """``model_type`` "phi"."""

    arch = gguf.MODEL_ARCH.PHI2
    rms = False
    # The same splitting as GPT-2; llama.cpp knows these models by their own name for it.
    pre_names: ClassVar[Mapping[str, str]] = {"gpt-2": "phi-2"}
    defaults: ClassVar[Mapping[str, Any]] = {
        "default_rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "hidden_act": "gelu_new",
    }

    def check(self) -> None:
        self.config.expect("hidden_act", "gelu_new")
        self.config.expect("qk_layernorm", False)
        if self.rope.theta != 10000.0:
            raise UnsupportedModelError(f"phi models with a rope_theta of {self.rope.theta}")
        if self.kv_heads != self.heads:
            raise UnsupportedModelError("phi models with fewer key heads than query heads")
        if self.config.integer("intermediate_size") != 4 * self.config.integer("hidden_size"):
            raise UnsupportedModelError("phi models whose intermediate_size is not 4 x hidden_size")

    def metadata(self) -> dict[str, Value]:
        width = self.config.integer("hidden_size")
        return {
            "block_count": self.layers,
            "context_length": self.config.integer("max_position_embeddings"),
            "embedding_length": width,
            "feed_forward_length": self.config.integer("intermediate_size"),
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_epsilon": self.config.number("layer_norm_eps"),
            "rope.dimension_count": int(self.rope.rotated * self.head_dim),
        }

    def tokenizer_metadata(self) -> dict[str, bool]:
        return {"tokenizer.ggml.add_bos_token": False}

    def decoder(self) -> Decoder:
        return replace(
            super().decoder(),
            norm="layer",
            activation="gelu_tanh",
            gated=False,
            parallel=True,
            parts={
                "qkv": SEPARATE["qkv"],
                "output": ("self_attn.dense",),
                "gate_up": ("mlp.fc1",),
                "down": ("mlp.fc2",),
                "norm": SEPARATE["norm"],
            },
            final_norm_name="model.final_layernorm",
        )
