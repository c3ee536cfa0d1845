"""What a model family is: its metadata and tensors in GGUF, and what it computes.

Knows llama.cpp's names for the facts all families share; never opens a file or sees a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray

from edgekit.errors import SourceError, UnknownNameError, UnsupportedModelError
from edgekit.exporters.arch import rope
from edgekit.exporters.arch.config import Config
from edgekit.exporters.arch.decoder import Decoder, Rotation
from edgekit.registry import GGUF_FAMILIES
from edgekit.source import ModelSource

Value = bool | int | float | str
Array = NDArray[np.float32]
MAX_LAYERS = 512
_MAX_HEAD_DIM = 8192


@dataclass(frozen=True)
class Placement:
    """The place of one source tensor in the GGUF file.

    ``change`` maps float32 rows to float32 rows and gets ``rows_together`` rows (or a multiple) at
    a time; 0 means the whole tensor. ``shape`` is what it makes of the source's shape, if not that.
    ``stack`` is (index, count) of a tensor that is one of ``count`` alike, which the file has as
    one, along a new first axis.
    """

    name: str
    change: Callable[[Array], Array] | None = None
    rows_together: int = 1
    shape: tuple[int, ...] | None = None
    stack: tuple[int, int] | None = None


class Family:
    """One row of ``edgekit.registry.GGUF_FAMILIES``: built from a config.json, then only asked.

    A family sets the class variables, extends ``check`` with what it cannot express, and
    overrides the three questions (``metadata``, ``place``, ``extra_tensors``) where it differs.
    """

    arch: ClassVar[gguf.MODEL_ARCH]
    # Values that transformers uses for keys which config.json leaves out.
    defaults: ClassVar[Mapping[str, Any]] = {}
    # Scalings of the rotary positions that llama.cpp computes for this family.
    scalings: ClassVar[tuple[str, ...]] = ()
    # tokenizer.ggml.pre where the family's models use another name for the same splitting.
    pre_names: ClassVar[Mapping[str, str]] = {}
    layers_key: ClassVar[str] = "num_hidden_layers"
    # Norms by the root of the mean square; else LayerNorm.
    rms: ClassVar[bool] = True

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises SourceError for bad values, UnsupportedModelError for what GGUF cannot express."""
        self.config = Config(config, self.defaults)
        self.layers = self.config.integer(self.layers_key)
        if self.layers > MAX_LAYERS:
            raise UnsupportedModelError(f"llama.cpp has no more than {MAX_LAYERS} layers")
        self.config.expect("quantization_config")
        self.config.expect("is_decoder", True, False)
        self.config.expect("add_cross_attention", False)
        self.rope = rope.read(self.config, *self.scalings)
        self._names = gguf.get_tensor_name_map(self.arch, self.layers)
        self.check()

    def check(self) -> None:
        """Raise UnsupportedModelError for settings that llama.cpp does not compute."""

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.integer("vocab_size")

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.config.integer("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        if self.config.get("num_key_value_heads") is None:
            return self.heads
        return self.config.integer("num_key_value_heads")

    @property
    def head_dim(self) -> int:
        """Values in one head."""
        if self.config.get("head_dim") is not None:
            stated = self.config.integer("head_dim")
            if stated % 2 or stated > _MAX_HEAD_DIM:
                raise SourceError(f"config.json: head_dim {stated} is odd or absurdly large")
            return stated
        width = self.config.integer("hidden_size")
        if width % self.heads:
            raise SourceError(
                f"config.json: hidden_size {width} is no multiple of {self.heads} heads"
            )
        return width // self.heads

    def metadata(self) -> dict[str, Value]:
        """Keys without the architecture's prefix; int becomes uint32, float becomes float32.

        Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llm
        """
        return {
            "block_count": self.layers,
            "context_length": self.config.integer("max_position_embeddings"),
            "embedding_length": self.config.integer("hidden_size"),
            "feed_forward_length": self.config.integer("intermediate_size"),
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.layer_norm_rms_epsilon": self.config.number("rms_norm_eps"),
            **self.rope_metadata(),
        }

    def rope_metadata(self) -> dict[str, Value]:
        """The base, and the scalings that llama.cpp computes from numbers alone."""
        found: dict[str, Value] = {"rope.freq_base": self.rope.theta}
        if self.rope.local_theta is not None:
            found["rope.freq_base_swa"] = self.rope.local_theta
        if self.rope.scaling in ("linear", "yarn"):
            found["rope.scaling.type"] = self.rope.scaling
            found["rope.scaling.factor"] = self.rope.number("factor")
        if self.rope.scaling == "yarn":
            found["rope.scaling.original_context_length"] = self.rope.integer(
                "original_max_position_embeddings"
            )
            for key, name in rope.YARN_NUMBERS.items():
                if key in self.rope.values:
                    found[f"rope.scaling.{name}"] = self.rope.number(key)
        return found

    def decoder(self) -> Decoder:
        """What the model computes. Raises UnsupportedModelError where no family says it."""
        width, context_length = (
            self.config.integer(key) for key in ("hidden_size", "max_position_embeddings")
        )
        return Decoder(
            layers=self.layers,
            width=width,
            inner=self.config.integer("intermediate_size"),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            context_length=context_length,
            epsilon=self.config.number("rms_norm_eps" if self.rms else "layer_norm_eps"),
            rotation=self.rotation(context_length),
            attention_scale=self.head_dim**-0.5,
            tied=bool(self.config.get("tie_word_embeddings")),
        )

    def rotation(self, context_length: int) -> Rotation:
        """The rotary positions of all layers but those with a base of their own."""
        return self.rope.rotation(self.head_dim)

    def tokenizer_metadata(self) -> dict[str, bool]:
        """Full keys that this family writes whatever its tokenizer says."""
        return {}

    def place(self, name: str, shape: tuple[int, ...]) -> Placement | None:
        """Where the source tensor ``name`` goes; None for tensors that carry nothing.

        Raises UnsupportedModelError for a name that the family does not have.
        """
        if name.endswith((".rotary_emb.inv_freq", ".attn.masked_bias")):
            return None
        return Placement(self.gguf_name(name))

    def gguf_name(self, name: str) -> str:
        """llama.cpp's name for the source tensor ``name``."""
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedModelError(
                f"{self.config.family} models have no tensor called '{name}' in GGUF"
            )
        return str(found)

    def extra_tensors(self) -> dict[str, Array]:
        """Tensors that llama.cpp wants and the source holds only as numbers in its config."""
        return {}


def family_of(source: ModelSource) -> Family:
    """The family of a Hugging Face folder.

    Raises what ``Family`` raises, and UnsupportedModelError for a ``model_type`` without a row.
    """
    try:
        kind = GGUF_FAMILIES.load(source.family)
    except UnknownNameError as error:
        raise UnsupportedModelError(
            f"'{source.family}' models cannot be written as GGUF", hint=error.hint
        ) from None
    family: Family = kind(source.config)
    return family
