"""Llama and everything built like it: TinyLlama, SmolLM2, Llama 2, Llama 3.

Knows how llama.cpp orders rotated heads; never opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from edgekit.errors import UnsupportedModelError
from edgekit.exporters.arch.family import Array, Family, Placement, Value


class Llama(Family):
    """``model_type`` "llama"."""

    arch = gguf.MODEL_ARCH.LLAMA
    scalings = ("linear", "llama3", "yarn")
    defaults: ClassVar[Mapping[str, Any]] = {
        "default_rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }

    def check(self) -> None:
        self.config.expect("hidden_act", "silu")
        if self.rope.rotated != 1.0:
            raise UnsupportedModelError(
                "llama models with a partial_rotary_factor have no GGUF form"
            )

    def metadata(self) -> dict[str, Value]:
        return {
            **super().metadata(),
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "rope.dimension_count": self.head_dim,
            "vocab_size": self.vocab_size,
        }

    def tokenizer_metadata(self) -> dict[str, bool]:
        # llama.cpp's own conversion does this for every llama with this vocabulary size.
        return {"tokenizer.ggml.add_bos_token": False} if self.vocab_size == 49152 else {}

    def place(self, name: str, shape: tuple[int, ...]) -> Placement | None:
        placed = super().place(name, shape)
        if placed and name.split(".")[-2] in ("q_proj", "k_proj"):
            return Placement(placed.name, self._pair_neighbours, rows_together=self.head_dim)
        return placed

    def _pair_neighbours(self, rows: Array) -> Array:
        """Reorder each head so that values which turn together are neighbours.

        transformers turns value i with value i + head_dim/2 (the halves layout of GPT-NeoX);
        llama.cpp turns 2i with 2i + 1, as in RoFormer (https://arxiv.org/abs/2104.09864).
        """
        halves = rows.reshape(-1, 2, self.head_dim // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)

    def extra_tensors(self) -> dict[str, Array]:
        if self.rope.scaling != "llama3":
            return {}
        return {"rope_freqs.weight": self.rope.llama3_divisors(self.head_dim)}
