"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and heads in their own order.

Knows their metadata in llama.cpp's words; never opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gguf

from edgekit.exporters.arch.family import Family


class Qwen2(Family):
    """``model_type`` "qwen2"."""

    arch = gguf.MODEL_ARCH.QWEN2
    scalings = ("linear", "yarn")
    defaults: ClassVar[Mapping[str, Any]] = {
        "default_rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }

    def check(self) -> None:
        self.config.expect("hidden_act", "silu")
        self.config.expect("use_sliding_window", False)
        self.config.expect("is_causal", True)
