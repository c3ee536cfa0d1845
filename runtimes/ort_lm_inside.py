"""What every matrix of an ONNX language model computes, read while ONNX Runtime reads a text.

Knows the names that edgekit's exporter gives to values; never another model, and it writes no file.
Only for a child process: it does no first-load check.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import language_model
from edgekit.errors import UsageError
from edgekit.formats import onnx
from edgekit.runtimes.hf_tokens import HfTokens
from edgekit.runtimes.onnx_layers import Opened

# Products, and the residual stream where it meets the next norm (exporters/lm_graph.py).
_SEEN = re.compile(
    r"\d+\.(qkv|attention|gate_up|fed|(mlp_)?norm\.stream)|final\.stream|embedded|logits"
)


class Inside:
    """A loaded ONNX language model whose values can be seen."""

    def __init__(self, path: Path) -> None:
        """Raises LoadError or InferenceError, what reading a header raises, and UsageError for a
        model that edgekit did not export.
        """
        header = onnx.read(path)
        self.facts = language_model.beside(path)
        self.tokenize = HfTokens(path.parent, self.facts).tokenize
        made = [name for node in header.nodes for name in node.outputs]
        self._names = [name for name in made if _SEEN.fullmatch(name)]
        if not {"0.qkv", "0.attention", "0.gate_up", "0.fed"} <= set(self._names):
            raise UsageError(f"{path.name} has no layers that edgekit knows by name")
        # Scales lie in float16, and the products of blocks want them as constants.
        self._session = Opened(path, header, self._names, folded=True)

    def values(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Of one fresh text: float32 [tokens, values] by name. Raises InferenceError."""
        facts, count = self.facts, len(tokens)
        nothing = np.zeros((1, facts.kv_heads, 0, facts.head_dim), np.float32)
        feed: dict[str, Any] = {
            f"past.{layer}.{kind}": nothing
            for layer in range(facts.layers)
            for kind in ("key", "value")
        }
        feed |= {
            "input_ids": np.array([tokens], np.int64),
            "rows": np.arange(count),
            "seqlens_k": np.array([count - 1], np.int32),
            "total_sequence_length": np.array(count, np.int32),
        }
        found = self._session.run(feed)
        return {name: value[0] for name, value in zip(self._names, found, strict=True)}
