"""Phi-3, Phi-3.5 and Phi-4: fused projections, and rotary factors for long contexts.

Knows their metadata in llama.cpp's words; never opens a file. llama.cpp computes full attention
for them whatever ``sliding_window`` says: beyond that window its answers differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import gguf
import numpy as np

from edgekit.errors import SourceError
from edgekit.exporters.arch.decoder import SEPARATE, Decoder, Rotation
from edgekit.exporters.arch.family import Array, Family, Value
from edgekit.exporters.arch.rope import attention_factor


class Phi3(Family):
    """``model_type`` "phi3"."""

    arch = gguf.MODEL_ARCH.PHI3
    scalings = ("longrope",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "default_rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }

    def check(self) -> None:
        self.config.expect("hidden_act", "silu")
        self.config.expect("attention_bias", False)

    @property
    def _trained_length(self) -> int:
        if "original_max_position_embeddings" in self.rope.values:
            return self.rope.integer("original_max_position_embeddings")
        return self.config.integer("original_max_position_embeddings")

    @property
    def _turning(self) -> int:
        """How many values of a head turn."""
        return int(self.rope.rotated * self.head_dim)

    def metadata(self) -> dict[str, Value]:
        window = self.config.get("sliding_window")
        found: dict[str, Value] = {
            **super().metadata(),
            "rope.dimension_count": self._turning,
            "rope.scaling.original_context_length": self._trained_length,
            # 0 tells llama.cpp that this model has no window (Phi-4).
            "attention.sliding_window": 0
            if window is None
            else self.config.integer("sliding_window"),
        }
        if self.rope.scaling == "longrope":
            found["rope.scaling.attn_factor"] = attention_factor(
                self.config.integer("max_position_embeddings"), self._trained_length
            )
        return found

    def extra_tensors(self) -> dict[str, Array]:
        if self.rope.scaling != "longrope":
            return {}
        found = {}
        for kind in ("long", "short"):
            factors = self.rope.numbers(f"{kind}_factor")
            if len(factors) != self._turning // 2:
                raise SourceError(
                    f"config.json: {kind}_factor must have {self._turning // 2} values"
                )
            found[f"rope_factors_{kind}.weight"] = np.array(factors, dtype=np.float32)
        return found

    def decoder(self) -> Decoder:
        whole = super().decoder()
        length = whole.context_length
        if self.rope.scaling == "longrope":
            # Beyond it longrope turns by other factors, which one graph cannot hold.
            length = min(length, self._trained_length)
        window = self.config.get("sliding_window")
        return replace(
            whole,
            context_length=length,
            windows=()
            if window is None
            else (self.config.integer("sliding_window"),) * self.layers,
            parts=SEPARATE | {"qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",)},
        )

    def rotation(self, context_length: int) -> Rotation:
        return self.rope.rotation(self.head_dim, context_length, self._trained_length)
