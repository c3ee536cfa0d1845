"""How many layers of a model fit the graphics memory that is free.

Must never load a model: it reads sizes from the header and asks the engine's devices.
"""

from __future__ import annotations

from edgekit import llama_library
from edgekit.formats.gguf import GgufHeader
from edgekit.runtime import LoadParams

ALL_LAYERS = 1 << 16
# For the compute buffers, and for whoever else draws on that screen.
_RESERVE_BYTES = 512 << 20
_CPU_BYTES_PER_CACHE_VALUE = 2


def layers_that_fit(header: GgufHeader, params: LoadParams) -> int:
    """Layers to offload: 0 without a GPU backend, ``ALL_LAYERS`` when everything fits."""
    if not llama_library.library().llama_supports_gpu_offload():
        return 0
    return count(header, params.n_ctx or 4096, llama_library.free_gpu_bytes())


def count(header: GgufHeader, n_ctx: int, free_bytes: int) -> int:
    """How many of a model's last layers fit ``free_bytes``, each with its part of the KV cache."""
    family = header.architecture
    layers: dict[int, int] = {}
    rest_bytes = 0
    for tensor in header.tensors:
        block, _, number = tensor.name.partition(".")
        if block == "blk":
            index = int(number.split(".")[0])
            layers[index] = layers.get(index, 0) + tensor.size_bytes
        else:
            rest_bytes += tensor.size_bytes
    heads = header.metadata.get(f"{family}.attention.head_count_kv", 0)
    heads = max(heads) if isinstance(heads, list) else heads
    width = header.metadata.get(f"{family}.embedding_length", 0)
    query_heads = header.metadata.get(f"{family}.attention.head_count", 1)
    query_heads = max(query_heads) if isinstance(query_heads, list) else query_heads
    cache_bytes = 2 * _CPU_BYTES_PER_CACHE_VALUE * n_ctx * heads * width // max(1, query_heads)
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
