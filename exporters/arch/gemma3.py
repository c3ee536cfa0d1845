"""Gemma 3, the text model: norms around every part, five layers with a window to one without.

Knows what llama.cpp fixes for this family and refuses the rest; never opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import gguf
import numpy as np

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters.arch.decoder import SEPARATE, Decoder
from edgekit.exporters.arch.family import Array, Family, Placement, Value
from edgekit.exporters.arch.qwen3 import HEAD_NORMS

_PATTERN = 6


class Gemma3(Family):
    """``model_type`` "gemma3_text", and the text part of "gemma3"."""

    arch = gguf.MODEL_ARCH.GEMMA3
    scalings = ("linear",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "default_rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = config.get("text_config")
        if text is not None and not isinstance(text, dict):
            raise SourceError("config.json: 'text_config' must be a mapping")
        super().__init__({**config, **text} if text else config)

    def check(self) -> None:
        self.config.expect("hidden_activation", "gelu_pytorch_tanh")
        self.config.expect("attn_logit_softcapping")
        self.config.expect("use_bidirectional_attention", False)
        self.config.expect("attention_bias", False)
        self.config.expect("sliding_window_pattern", _PATTERN)
        self.config.expect("_sliding_window_pattern", _PATTERN)
        if self.config.get("layer_types") not in (None, layer_types(self.layers)):
            raise UnsupportedModelError("gemma3 models whose full layers are not every sixth")
        scale = self.config.integer("query_pre_attn_scalar")
        width = self.config.integer("hidden_size")
        if scale != query_scale(self.layers, width, self.heads, self.head_dim):
            raise UnsupportedModelError(f"gemma3 models with query_pre_attn_scalar={scale}")

    def metadata(self) -> dict[str, Value]:
        found: dict[str, Value] = {
            **super().metadata(),
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.sliding_window": self.config.integer("sliding_window"),
        }
        if self.config.get("final_logit_softcapping"):
            found["final_logit_softcapping"] = self.config.number("final_logit_softcapping")
        return found

    def place(self, name: str, shape: tuple[int, ...]) -> Placement | None:
        name = name.replace("language_model.", "")
        if name.startswith(("vision_tower.", "model.vision_tower.")) or "projector." in name:
            return None
        # The output is the embedding; a copy of it in the file has no place in llama.cpp's model.
        if name == "lm_head.weight":
            return None
        placed = super().place(name, shape)
        if placed and name.endswith("norm.weight"):
            # transformers multiplies by 1 + weight, llama.cpp by the weight.
            return Placement(placed.name, _plus_one)
        return placed

    def decoder(self) -> Decoder:
        width = self.config.integer("hidden_size")
        window = self.config.integer("sliding_window")
        kinds = layer_types(self.layers)
        return replace(
            super().decoder(),
            gain_offset=1.0,
            activation="gelu_tanh",
            head_norms=True,
            after_norms=True,
            attention_scale=self.config.integer("query_pre_attn_scalar") ** -0.5,
            embedding_scale=float(np.sqrt(np.float32(width))),
            logit_cap=float(self.config.get("final_logit_softcapping") or 0),
            tied=True,
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            local_rotation=self.rope.local_rotation(self.head_dim),
            parts=SEPARATE
            | HEAD_NORMS
            | {
                "after_attention": ("post_attention_layernorm",),
                "mlp_norm": ("pre_feedforward_layernorm",),
                "after_mlp": ("post_feedforward_layernorm",),
            },
        )


def layer_types(layers: int) -> list[str]:
    """transformers' words for which layers have a window."""
    return [
        "sliding_attention" if (layer + 1) % _PATTERN else "full_attention"
        for layer in range(layers)
    ]


def query_scale(layers: int, width: int, heads: int, head_dim: int) -> int:
    """By the root of what llama.cpp divides queries: the head, or the width over the heads in the
    27B model, which it knows by its 62 layers.

    https://github.com/google/gemma_pytorch, config.py, query_pre_attn_scalar.
    """
    return width // heads if layers == 62 else head_dim


def _plus_one(gain: Array) -> Array:
    return gain + np.float32(1)
