"""What a model takes of a board's memory: weights, KV cache, compute buffers, runtime.

Knows headers and sizes; never a speed or a board.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgekit.formats.ggml_types import TYPES
from edgekit.formats.gguf import GgufHeader
from edgekit.model_cost import ModelCost
from edgekit.vision_cost import VisionCost

# Python, numpy and libllama, and what a token of the vocabulary takes beside them: measured as the
# resident set of sessions.
RUNTIME_BYTES = 60 << 20
_TOKEN_BYTES = 200
# Of a vision engine: Python, numpy and onnxruntime or LiteRT.
VISION_RUNTIME_BYTES = 90 << 20
# Of a language model in onnxruntime: the same, and what a token takes of the tokenizer. The engine
# lays the weights out anew when it loads them, and lets go of little of the file: SmolLM2 in 4 bits
# (92 MB) had a resident set of 283 MiB, its cache and buffers aside.
GRAPH_RUNTIME_BYTES = 70 << 20
_GRAPH_TOKEN_BYTES = 800
_GRAPH_COPIES = 2.0
# The engine keeps the cache in whole blocks of this many tokens.
_CACHE_BLOCK = 256


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. ``weights_by_type`` adds up to ``weights``; ``gpu`` of ``total`` lie on a GPU.

    ``available`` is what the board leaves to us.
    """

    weights: int
    kv_cache: int
    compute: int
    runtime: int
    available: int
    weights_by_type: dict[str, int]
    gpu: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.compute + self.runtime

    @property
    def margin(self) -> int:
        """What is left of ``available``; negative where the model does not fit."""
        return self.available - (self.total - self.gpu)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "weights": self.weights,
            "kv_cache": self.kv_cache,
            "compute": self.compute,
            "runtime": self.runtime,
            "total": self.total,
            "available": self.available,
            "margin": self.margin,
            "gpu": self.gpu,
            "weights_by_type": self.weights_by_type,
        }


def of_model(
    header: GgufHeader,
    cost: ModelCost,
    *,
    context: int,
    n_seqs: int,
    n_batch: int,
    kv_type: str,
    available: int,
    graph: bool = False,
) -> MemoryPlan:
    """The memory of a language model in llama.cpp, for ``n_seqs`` contexts of ``context`` tokens;
    with ``graph`` in onnxruntime.

    In llama.cpp weights count once, in the file's types: the engine maps the file, and what it
    repacks replaces pages that the kernel can drop.
    """
    by_type: dict[str, int] = {}
    for tensor in header.tensors:
        size = round(tensor.size_bytes * (_GRAPH_COPIES if graph else 1))
        by_type[tensor.type] = by_type.get(tensor.type, 0) + size
    base, each = RUNTIME_BYTES, _TOKEN_BYTES
    if graph:
        base, each = GRAPH_RUNTIME_BYTES, _GRAPH_TOKEN_BYTES
    return MemoryPlan(
        weights=sum(by_type.values()),
        kv_cache=cache_bytes(
            cost, context=context, n_seqs=n_seqs, n_batch=n_batch, kv_type=kv_type
        ),
        compute=compute_bytes(header, n_batch=min(n_batch, context), n_seqs=n_seqs),
        runtime=base + each * _vocabulary(header),
        available=available,
        weights_by_type=dict(sorted(by_type.items(), key=lambda pair: -pair[1])),
    )


def cache_bytes(cost: ModelCost, *, context: int, n_seqs: int, n_batch: int, kv_type: str) -> int:
    """Bytes of keys and values; a layer with a window keeps that and a batch, not the context."""
    kind = next(kind for kind in TYPES.values() if kind.name.lower() == kv_type)
    values = 0
    for layer in cost.layers:
        tokens = context if layer.window is None else min(context, layer.window + n_batch)
        values += layer.values * -(-tokens // _CACHE_BLOCK) * _CACHE_BLOCK
    return n_seqs * values // kind.block_size * kind.type_size


def compute_bytes(header: GgufHeader, *, n_batch: int, n_seqs: int) -> int:
    """Bytes of the engine's buffers: the widest layer of a batch, and the logits of a step.

    The engine reserves logits for a whole batch, but what nobody writes takes no memory. With flash
    attention no scores are kept.
    """
    width, inner = _number(header, "embedding_length"), _number(header, "feed_forward_length")
    return 4 * (n_batch * (3 * inner + 2 * width) + n_seqs * _vocabulary(header))


def _vocabulary(header: GgufHeader) -> int:
    tables = [tensor for tensor in header.tensors if tensor.name == "token_embd.weight"]
    return tables[0].shape[1] if tables and len(tables[0].shape) > 1 else 0


def _number(header: GgufHeader, key: str) -> int:
    """A size that the header gives once, or once a layer: then the largest."""
    value = header.metadata.get(f"{header.architecture}.{key}", 0)
    if isinstance(value, list):
        value = max((each for each in value if isinstance(each, int)), default=0)
    return value if isinstance(value, int) else 0


def of_vision(
    cost: VisionCost, *, int8: bool, available: int, stored: Mapping[str, int] | None = None
) -> MemoryPlan:
    """The memory of a vision model: weights, the activations that live at one time, the runtime.

    ``stored`` are the bytes of its weights by dtype, where they are known.
    """
    kind, value_bytes = ("int8", 1) if int8 else ("F32", 4)
    by_type = dict(stored) if stored else {kind: round(cost.weights * value_bytes)}
    weights = sum(by_type.values())
    return MemoryPlan(
        weights=weights,
        kv_cache=0,
        compute=round(2 * cost.peak * value_bytes),
        runtime=VISION_RUNTIME_BYTES,
        available=available,
        weights_by_type=by_type,
    )
