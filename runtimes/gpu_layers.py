"""How many layers of a model fit the graphics memory that is free.

Must never load a model: it reads sizes from the header and asks the engine's devices.
"""

from __future__ import annotations

from edgekit import llama_library
from edgekit.formats.ggml_types import TYPES
from edgekit.formats.gguf import GgufHeader
from edgekit.runtime import DEFAULT_N_CTX, LoadParams

ALL_LAYERS = 1 << 16
# For the compute buffers, and for whoever else draws on that screen.
_RESERVE_BYTES = 512 << 20


def layers_that_fit(header: GgufHeader, params: LoadParams) -> int:
    """Layers to offload: 0 without a GPU backend, ``ALL_LAYERS`` when everything fits."""
    if not llama_library.libllama().llama_supports_gpu_offload():
        return 0
    return count(header, params, llama_library.free_gpu_bytes())


def count(header: GgufHeader, params: LoadParams, free_bytes: int) -> int:
    """How many of a model's last layers fit ``free_bytes``, each with its part of the KV cache."""
    layers: dict[int, int] = {}
    rest_bytes = 0
    for tensor in header.tensors:
        block, _, number = tensor.name.partition(".")
        if block == "blk":
            index = int(number.split(".")[0])
            layers[index] = layers.get(index, 0) + tensor.size_bytes
        else:
            rest_bytes += tensor.size_bytes
    cache_bytes = layer_cache_bytes(header, params)
    left = free_bytes - _RESERVE_BYTES
    if left >= sum(layers.values()) + rest_bytes + len(layers) * cache_bytes:
        return ALL_LAYERS
    fitting = 0
    for index in sorted(layers, reverse=True):
        left -= layers[index] + cache_bytes
        if left < 0:
            break
        fitting += 1
    return fitting


def layer_cache_bytes(header: GgufHeader, params: LoadParams) -> int:
    """Keys and values of one layer for the whole context, in bytes.

    Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; a length that the file leaves
    out is the model's width by its heads. Where layers differ, the widest counts.
    """

    def widest(key: str, default: int) -> int:
        found = header.metadata.get(f"{header.architecture}.{key}", default)
        return max(found, default=default) if isinstance(found, list) else int(found)

    heads = widest("attention.head_count", 1)
    kv_heads = widest("attention.head_count_kv", heads)
    width = widest("embedding_length", 0) // max(1, heads)
    lengths = widest("attention.key_length", width) + widest("attention.value_length", width)
    kind = next(kind for kind in TYPES.values() if kind.name.lower() == params.kv_type)
    return (params.n_ctx or DEFAULT_N_CTX) * kind.size_bytes(kv_heads * lengths)
