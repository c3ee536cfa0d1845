"""Mixtral: a Llama whose feed-forward parts are mixtures of experts; llama.cpp's "llama" has them.

Knows their metadata and how single experts become one tensor; never opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from edgekit.errors import UnsupportedModelError
from edgekit.exporters.arch.decoder import Decoder
from edgekit.exporters.arch.family import Placement, Value
from edgekit.exporters.arch.llama import Llama

_EXPERT = re.compile(
    r"model\.layers\.(\d{1,4})\.block_sparse_moe\.experts\.(\d{1,4})\.(w[123])\.weight", re.ASCII
)
_ROLES = {"w1": "gate", "w2": "down", "w3": "up"}
_MAX_EXPERTS = 256


class Mixtral(Llama):
    """``model_type`` "mixtral"."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **Llama.defaults,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }

    def check(self) -> None:
        super().check()
        self.config.expect("sliding_window")
        if not 0 < self._chosen <= self._experts <= _MAX_EXPERTS:
            raise UnsupportedModelError(
                f"{self._chosen} of {self._experts} experts a token are no mixture that llama.cpp"
                f" computes: it has at most {_MAX_EXPERTS}"
            )

    @property
    def _experts(self) -> int:
        return self.config.integer("num_local_experts")

    @property
    def _chosen(self) -> int:
        return self.config.integer("num_experts_per_tok")

    def metadata(self) -> dict[str, Value]:
        found = super().metadata()
        if self.config.get("head_dim") is None:  # llama.cpp then takes the width over the heads
            found.pop("attention.key_length")
            found.pop("attention.value_length")
        return {
            **found,
            "expert_count": self._experts,
            "expert_used_count": self._chosen,
        }

    def place(self, name: str, shape: tuple[int, ...]) -> Placement | None:
        found = _EXPERT.fullmatch(name)
        if not found:
            return super().place(name, shape)
        layer, expert, role = int(found[1]), int(found[2]), _ROLES[found[3]]
        if layer >= self.layers or expert >= self._experts:
            raise UnsupportedModelError(f"config.json has no place for the tensor '{name}'")
        return Placement(f"blk.{layer}.ffn_{role}_exps.weight", stack=(expert, self._experts))

    def decoder(self) -> Decoder:
        raise UnsupportedModelError(
            "models with experts have no ONNX form here", hint="--format gguf"
        )
