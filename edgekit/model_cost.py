"""What one token costs: bytes that must be read and arithmetic that must be done, from a header.

Knows GGUF headers only; never a machine, a speed or an engine.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from edgekit.errors import UsageError
from edgekit.formats.ggml_types import TYPES
from edgekit.formats.gguf import GgufHeader, GgufTensor

_BY_NAME = {kind.name: kind for kind in TYPES.values()}

# Tables that are looked into, a row a token; the rest of them is not read.
_LOOKUPS = ("token_embd.weight", "position_embd.weight", "token_types.weight")
_LOOKUPS_PER_LAYER = "per_layer_token_embd.weight"
_OUTPUT = "output.weight"
_EXPERTS = "_exps."

# Of these families every n-th layer looks at the whole context and the others at a window, unless
# the file says otherwise (llama.cpp, src/models).
_WINDOW_PERIODS = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "cohere2": 4,
    "olmo2": 4,
    "exaone4": 4,
}


@dataclass(frozen=True)
class Matrices:
    """Weights of one type that products use; of ``experts`` copies each token needs ``used``."""

    type: str
    weights: int
    size_bytes: int
    experts: int = 1
    used: int = 1
    output: bool = False

    def part_read(self, n_tokens: int) -> float:
        """The part of the bytes that ``n_tokens`` tokens read together.

        Experts: the expected part if a router picks evenly, 1 - (1 - used / experts) ^ n_tokens.
        """
        return 1 - (1 - self.used / self.experts) ** n_tokens

    @property
    def flops_per_token(self) -> float:
        """A multiplication and an addition a weight."""
        return 2.0 * self.weights * self.used / self.experts


@dataclass(frozen=True)
class AttentionLayer:
    """Values that a position leaves in the cache, and FLOP that each later query spends on it."""

    values: int
    query_flops: int
    window: int | None

    def seen(self, depth: float) -> float:
        """Positions that a query behind ``depth`` others looks at."""
        return depth if self.window is None else min(depth, self.window)


@dataclass(frozen=True)
class ModelCost:
    """Bytes and FLOP of a token. ``other_bytes`` are gains, biases and looked-up rows."""

    matrices: tuple[Matrices, ...]
    other_bytes: int
    layers: tuple[AttentionLayer, ...]

    @property
    def weight_bytes_per_token(self) -> float:
        """Bytes of weights that one decoded token reads."""
        return self.weight_bytes(1)

    def weight_bytes(self, n_tokens: int) -> float:
        """Bytes of weights that a step of ``n_tokens`` tokens reads, each only once."""
        return self.other_bytes + sum(m.size_bytes * m.part_read(n_tokens) for m in self.matrices)

    @property
    def flops_per_token(self) -> float:
        """FLOP of the matrix products of one decoded token; attention comes on top."""
        return sum(m.flops_per_token for m in self.matrices)

    def flops_by_type(self, *, output: bool = True) -> dict[str, float]:
        """FLOP of a token's matrix products by tensor type, with or without the output matrix.

        Prefill asks for the logits of the last token only.
        """
        found: dict[str, float] = {}
        for each in self.matrices:
            if output or not each.output:
                found[each.type] = found.get(each.type, 0.0) + each.flops_per_token
        return found

    def attention_flops(self, depth: float) -> float:
        """FLOP of a query behind ``depth`` positions: its products with their keys and values."""
        return sum(layer.query_flops * layer.seen(depth) for layer in self.layers)

    def kv_bytes(self, depth: float, kv_type: str = "f16") -> float:
        """Bytes of the cache that a query behind ``depth`` positions reads."""
        values = sum(layer.values * layer.seen(depth) for layer in self.layers)
        return values * _value_bytes(kv_type)

    def kv_bytes_per_position(self, kv_type: str = "f16") -> float:
        """Bytes that one position takes in the cache, all layers together."""
        return sum(layer.values for layer in self.layers) * _value_bytes(kv_type)

    @property
    def types(self) -> tuple[str, ...]:
        """Tensor types that products use."""
        return tuple(sorted({each.type for each in self.matrices}))


def _value_bytes(kv_type: str) -> float:
    kind = _BY_NAME.get(kv_type.upper())
    if kind is None:
        raise UsageError(f"kv_type '{kv_type}' is unknown")
    return kind.type_size / kind.block_size


def cost(header: GgufHeader) -> ModelCost:
    """What a token costs in the model of ``header``.

    A tied embedding table counts as the output matrix that it is. Of experts, those that the
    metadata calls active. Sliding windows count where the file or its family tells their layers.
    Raises CorruptArtifactError for a file without an architecture.
    """
    tied = not any(tensor.name == _OUTPUT for tensor in header.tensors)
    groups: Counter[tuple[str, bool, bool]] = Counter()
    sizes: Counter[tuple[str, bool, bool]] = Counter()
    other_bytes = 0
    for tensor in header.tensors:
        output = tensor.name == (_LOOKUPS[0] if tied else _OUTPUT)
        if len(tensor.shape) < 2:
            other_bytes += tensor.size_bytes
        elif not output and tensor.name in (*_LOOKUPS, _LOOKUPS_PER_LAYER):
            other_bytes += _row_bytes(tensor)
        else:
            group = tensor.type, _EXPERTS in tensor.name, output
            groups[group] += tensor.elements
            sizes[group] += tensor.size_bytes
    experts = _number(header, "expert_count", 0) or 1
    used = min(_number(header, "expert_used_count", 0) or experts, experts)
    matrices = tuple(
        Matrices(
            type=kind,
            weights=groups[kind, routed, output],
            size_bytes=sizes[kind, routed, output],
            experts=experts if routed else 1,
            used=used if routed else 1,
            output=output,
        )
        for kind, routed, output in sorted(groups)
    )
    return ModelCost(matrices, other_bytes, _layers(header))


def _row_bytes(tensor: GgufTensor) -> int:
    return tensor.size_bytes // (tensor.elements // tensor.shape[0])


def _layers(header: GgufHeader) -> tuple[AttentionLayer, ...]:
    n_layers = _number(header, "block_count", 0)
    heads = _per_layer(header, "attention.head_count", n_layers, 0)
    kv_heads = _per_layer(header, "attention.head_count_kv", n_layers, None)
    width = _number(header, "embedding_length", 0)
    windows = _windows(header, n_layers)
    layers = []
    for i in range(n_layers):
        n_heads = heads[i] or 0
        n_kv = n_heads if kv_heads[i] is None else kv_heads[i] or 0
        head = width // n_heads if n_heads else 0
        key = _number(header, "attention.key_length", head)
        value = _number(header, "attention.value_length", head)
        # A recurrent layer of a hybrid model has no heads, and keeps nothing per position.
        both = key + value
        layers.append(AttentionLayer(n_kv * both, 2 * n_heads * both if n_kv else 0, windows[i]))
    return tuple(layers)


def _windows(header: GgufHeader, n_layers: int) -> list[int | None]:
    """The sliding window of each layer; None for those that look at everything, or may."""
    window = _number(header, "attention.sliding_window", 0)
    pattern: Any = header.metadata.get(
        f"{header.architecture}.attention.sliding_window_pattern",
        _WINDOW_PERIODS.get(header.architecture),
    )
    if not window or not pattern:
        return [None] * n_layers
    if isinstance(pattern, list):
        slides = [bool(flag) for flag in pattern] + [False] * n_layers
    else:
        slides = [i % pattern < pattern - 1 for i in range(n_layers)]
    return [window if slides[i] else None for i in range(n_layers)]


def _number(header: GgufHeader, key: str, default: int) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}", default)
    return value if isinstance(value, int) else default


def _per_layer(
    header: GgufHeader, key: str, n_layers: int, default: int | None
) -> list[int | None]:
    """A figure that a file gives once, or once a layer."""
    value = header.metadata.get(f"{header.architecture}.{key}", default)
    if isinstance(value, list):
        return [*value, *[default] * n_layers][:n_layers]
    return [value] * n_layers
