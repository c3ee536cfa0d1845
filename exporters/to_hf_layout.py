"""What a family is to the converter from GGUF: its config.json, and where each tensor goes.

Knows the facts that all families share, under both names; never opens a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters.arch.rope import YARN_NUMBERS
from edgekit.formats.foreign import shown
from edgekit.formats.gguf import GgufHeader

Array = NDArray[np.float32]
ReadTensor = Callable[[str], Array]

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Destination:
    """Where a GGUF tensor goes. ``change`` maps the whole float32 tensor (rows first) to its new
    values; ``transposed`` says that it swaps the two dimensions.
    """

    name: str
    change: Callable[[Array], Array] | None = None
    transposed: bool = False


class Layout:
    """One family: built from a header, then asked for its config and for each tensor's place.

    ``read`` gives a tensor as float32, for families that keep numbers of their config in one.
    """

    model_type: ClassVar[str]
    model_class: ClassVar[str]
    top: ClassVar[dict[str, str]]
    block: ClassVar[dict[str, str]]
    # Tensors whose content `config` puts into words.
    spoken: ClassVar[tuple[str, ...]] = ()

    def __init__(self, header: GgufHeader, read: ReadTensor) -> None:
        self.header = header
        self.read = read
        self.names = {tensor.name for tensor in header.tensors}
        self.layers = self.integer("block_count")
        self.heads = self.integer("attention.head_count")
        self.width = self.integer("embedding_length")
        self._check_heads()

    def _check_heads(self) -> None:
        """Changes cut rows into heads, so what the metadata says must be what the tensors are."""
        if self.head_dim % 2:
            raise UnsupportedModelError(f"heads of {self.head_dim} values")
        rows = {"attn_q.weight": self.heads, "attn_k.weight": self.kv_heads}
        for tensor in self.header.tensors:
            heads = rows.get(tensor.name.partition(".")[2].partition(".")[2])
            if heads and tensor.shape != (self.width, heads * self.head_dim):
                raise SourceError(f"{shown(tensor.name)} does not have {heads} heads")

    def value(self, key: str, default: Any = None) -> Any:
        """The metadata value of ``<architecture>.<key>``; SourceError without it or a default."""
        found = self.header.metadata.get(f"{self.header.architecture}.{key}", default)
        if found is None:
            raise SourceError(f"the GGUF file has no {self.header.architecture}.{key}")
        return found

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        found = self.value(key, default)
        if type(found) is not int or not 0 < found < 1 << 31:
            raise UnsupportedModelError(
                f"{self.header.architecture}.{key} is {shown(str(found))}, not a positive number"
            )
        return found

    def number(self, key: str, default: float | None = None) -> float:
        """A finite float32, written with the fewest digits that give it back (1e-05)."""
        found = self.value(key, default)
        if isinstance(found, str | list) or not math.isfinite(found):
            raise SourceError(f"{self.header.architecture}.{key} is {shown(str(found))}")
        return float(str(np.float32(found)))

    @property
    def kv_heads(self) -> int:
        return self.integer("attention.head_count_kv", self.heads)

    @property
    def head_dim(self) -> int:
        """Values in one head."""
        if self.width % self.heads and f"{self.header.architecture}.attention.key_length" not in (
            self.header.metadata
        ):
            raise SourceError(f"the width {self.width} is no multiple of {self.heads} heads")
        return self.integer("attention.key_length", self.width // self.heads)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.header.tensor("token_embd.weight").shape[-1]

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding itself."""
        return "output.weight" not in self.names

    def destination(self, name: str) -> Destination | None:
        """Where the tensor ``name`` goes; None for one that ``config`` already speaks of.

        Raises UnsupportedModelError for a tensor that the family does not have.
        """
        if name in self.spoken:
            return None
        stem, _, suffix = name.rpartition(".")
        match = _BLOCK.fullmatch(stem)
        if match and int(match[1]) < self.layers:
            found = self.block.get(match[2])
            prefix = f"{self.block['']}.{match[1]}."
        else:
            found, prefix = self.top.get(stem), ""
        if found is None or suffix not in ("weight", "bias"):
            raise UnsupportedModelError(
                f"{self.model_type} models in Hugging Face form have no tensor for {shown(name)}"
            )
        return self.adapt(match[2] if match else stem, f"{prefix}{found}.{suffix}")

    def adapt(self, stem: str, name: str) -> Destination:
        """The destination ``name`` of a tensor that GGUF calls ``stem`` (without its block)."""
        return Destination(name)

    def config(self) -> dict[str, Any]:
        """config.json, without the dtype and the special tokens."""
        return {
            "architectures": [self.model_class],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.integer("feed_forward_length"),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.integer("context_length"),
            "tie_word_embeddings": self.tied,
            **self.own_config(),
            **self.rope_config(),
        }

    def missing_layers(self) -> set[int]:
        """Layers that have no tensor at all: the sign of a file that was cut apart."""
        present = {int(match[1]) for name in self.names if (match := _BLOCK.match(name))}
        return set(range(self.layers)) - present

    def own_config(self) -> dict[str, Any]:
        """What only this family says."""
        return {}

    def rope_scaling(self) -> dict[str, Any] | None:
        """The scaling of the rotary positions, as both releases of transformers spell it."""
        kind = self.value("rope.scaling.type", "none")
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise UnsupportedModelError(f"rope scaling {shown(kind)} of {self.model_type} models")
        scaling: dict[str, Any] = {"rope_type": kind, "factor": self.number("rope.scaling.factor")}
        if kind == "yarn":
            key = "original_max_position_embeddings"
            scaling[key] = self.integer("rope.scaling.original_context_length")
            for new, old in YARN_NUMBERS.items():
                if f"{self.header.architecture}.rope.scaling.{old}" in self.header.metadata:
                    scaling[new] = self.number(f"rope.scaling.{old}")
        return scaling

    def rope_config(self) -> dict[str, Any]:
        """Base and scaling twice: `rope_parameters` is what transformers 5 reads, the others 4.x.

        A 4.x release that finds only `rope_parameters` silently turns by theta 10000.
        """
        theta = self.number("rope.freq_base", 10000.0)
        scaling = self.rope_scaling()
        return {
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
        }
