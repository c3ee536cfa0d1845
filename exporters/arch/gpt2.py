"""GPT-2: learned positions, LayerNorm, and matrices stored the other way round.

Knows their metadata in llama.cpp's words; never opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from edgekit.errors import UnsupportedModelError
from edgekit.exporters.arch.decoder import Decoder
from edgekit.exporters.arch.family import Array, Family, Placement, Value

# Stored as [inputs, outputs], the rows of transformers' Conv1D.
_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


class Gpt2(Family):
    """``model_type`` "gpt2"."""

    arch = gguf.MODEL_ARCH.GPT2
    layers_key = "n_layer"
    defaults: ClassVar[Mapping[str, Any]] = {
        "default_rope_theta": 10000.0,
        "layer_norm_epsilon": 1e-5,
        "n_positions": 1024,
        "activation_function": "gelu_new",
    }

    def check(self) -> None:
        self.config.expect("activation_function", "gelu_new")
        self.config.expect("scale_attn_weights", True)
        self.config.expect("scale_attn_by_inverse_layer_idx", False)
        inner = self.config.get("n_inner")
        if inner is not None and inner != 4 * self.config.integer("n_embd"):
            raise UnsupportedModelError("gpt2 models whose n_inner is not 4 x n_embd")

    def metadata(self) -> dict[str, Value]:
        return {
            "block_count": self.layers,
            "context_length": self.config.integer("n_positions"),
            "embedding_length": self.config.integer("n_embd"),
            "feed_forward_length": 4 * self.config.integer("n_embd"),
            "attention.head_count": self.config.integer("n_head"),
            "attention.layer_norm_epsilon": self.config.number("layer_norm_epsilon"),
        }

    def place(self, name: str, shape: tuple[int, ...]) -> Placement | None:
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            return None  # the causal mask, which old files carry along
        placed = super().place(name, shape)
        if placed and name.endswith(_TRANSPOSED) and len(shape) == 2:
            return Placement(placed.name, _transposed, rows_together=0, shape=(shape[1], shape[0]))
        return placed

    def decoder(self) -> Decoder:
        raise UnsupportedModelError(
            "gpt2 models cannot be written as ONNX", hint="--format gguf takes them"
        )


def _transposed(matrix: Array) -> Array:
    return matrix.T
