"""What a decoder-only language model computes, in words that no file format owns.

Knows shapes, norms, rotary positions and where a Hugging Face folder keeps each matrix; never a
weight, and never an operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

# The parts of a layer -> their names in a folder; several are stacked, in this order. What a folder
# does not have (a bias, a norm) is left out.
SEPARATE = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
    "norm": ("input_layernorm",),
    "mlp_norm": ("post_attention_layernorm",),
}


@dataclass(frozen=True)
class Rotation:
    """Rotary positions: value i of a head turns with value i + ``turning`` (the halves layout), by
    ``frequencies[i]`` a position; float32 [turning]. Values beyond 2 x ``turning`` stay. Both are
    multiplied by ``factor`` (YaRN, https://arxiv.org/abs/2309.00071, section 3.4).
    """

    frequencies: NDArray[np.float32]
    factor: float = 1.0

    @property
    def turning(self) -> int:
        return len(self.frequencies)


@dataclass(frozen=True)
class Decoder:
    """One model: a table of embeddings, layers of attention and feed-forward parts, a norm, a head.

    ``norm`` is "rms" or "layer"; gains are stored less ``gain_offset``. ``activation`` is "silu" or
    "gelu_tanh"; where ``gated``, it is that of a gate, which "up" is multiplied by. ``parallel``:
    both parts of a layer read the same norm, and both are added. ``head_norms``: a norm on every
    head of queries and keys. ``after_norms``: a norm behind each part. Queries are multiplied by
    ``attention_scale``, embeddings by ``embedding_scale``. ``windows`` has a length for each layer
    that sees so many tokens alone, ``rotations`` one rotation, or one for each kind of layer, which
    ``local`` tells apart. ``tied``: the head is the table.
    """

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    epsilon: float
    rotation: Rotation
    norm: str = "rms"
    gain_offset: float = 0.0
    activation: str = "silu"
    gated: bool = True
    parallel: bool = False
    head_norms: bool = False
    after_norms: bool = False
    attention_scale: float = 0.0
    embedding_scale: float = 1.0
    logit_cap: float = 0.0
    tied: bool = False
    windows: tuple[int | None, ...] = ()
    local_rotation: Rotation | None = None
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(SEPARATE))
    embedding_name: str = "model.embed_tokens"
    final_norm_name: str = "model.norm"
    head_name: str = "lm_head"
    layer_name: str = "model.layers.{}"

    def window(self, layer: int) -> int | None:
        """How many tokens a layer sees; None: all."""
        return self.windows[layer] if self.windows else None

    def rotation_of(self, layer: int) -> Rotation:
        """Layers with a window may turn at their own speed."""
        if self.local_rotation is not None and self.window(layer) is not None:
            return self.local_rotation
        return self.rotation

    def names(self, layer: int, part: str) -> tuple[str, ...]:
        """What a folder calls the pieces of a layer's part, without ".weight" or ".bias"."""
        prefix = self.layer_name.format(layer)
        return tuple(f"{prefix}.{name}" for name in self.parts[part])
