"""Qwen3 (dense): Qwen2 without biases, with a norm on every head of q and k.

Knows their metadata in llama.cpp's words; never opens a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import gguf

from edgekit.exporters.arch.decoder import SEPARATE, Decoder
from edgekit.exporters.arch.family import Value
from edgekit.exporters.arch.qwen2 import Qwen2

HEAD_NORMS = {"query_norm": ("self_attn.q_norm",), "key_norm": ("self_attn.k_norm",)}


class Qwen3(Qwen2):
    """``model_type`` "qwen3"."""

    arch = gguf.MODEL_ARCH.QWEN3
    defaults: ClassVar[Mapping[str, Any]] = {**Qwen2.defaults, "head_dim": 128}

    def check(self) -> None:
        super().check()
        self.config.expect("attention_bias", False)

    def metadata(self) -> dict[str, Value]:
        return {
            **super().metadata(),
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
        }

    def decoder(self) -> Decoder:
        return replace(super().decoder(), head_norms=True, parts=SEPARATE | HEAD_NORMS)
