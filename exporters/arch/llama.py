"""Llama and everything built like it: TinyLlama, SmolLM2, Llama 2, Llama 3.

Knows how llama.cpp orders rotated heads and scales their frequencies; never opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import gguf
import numpy as np

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
        return {"rope_freqs.weight": self._llama3_divisors()}

    def _llama3_divisors(self) -> Array:
        """What each rotary frequency is divided by, float32 [head_dim / 2].

        Long waves are divided by ``factor``, short ones stay, those between are blended; see
        ``_compute_llama3_parameters`` of transformers' modeling_rope_utils.py.
        """
        factor = self.rope.number("factor")
        low = self.rope.number("low_freq_factor")
        high = self.rope.number("high_freq_factor")
        trained = self.rope.number("original_max_position_embeddings")
        if not (factor > 0 and 0 < low < high and trained > 0):
            raise UnsupportedModelError("llama3 rope scaling needs 0 < low_freq_factor < high")
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        # In float32 and in this order, so that the bits are those of llama.cpp's own conversion.
        frequencies = np.float32(1) / np.float32(self.rope.theta) ** exponents
        divisors = []
        for wave in np.float32(2 * math.pi) / frequencies:
            if wave < trained / high:
                divisors.append(np.float32(1))
            elif wave > trained / low:
                divisors.append(np.float32(factor))
            else:
                kept = (np.float32(trained) / wave - np.float32(low)) / np.float32(high - low)
                blend = (np.float32(1) - kept) / np.float32(factor) + kept
                divisors.append(np.float32(1) / blend)
        return np.array(divisors, dtype=np.float32)
