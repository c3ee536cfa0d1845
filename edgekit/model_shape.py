"""The tensors that a model will have as GGUF, told from its config.json alone.

Knows the shapes of decoder families; never a weight, and never whether an exporter can write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.formats.foreign import shown
from edgekit.formats.gguf import DEFAULT_ALIGNMENT, GgufHeader, GgufTensor
from edgekit.registry import did_you_mean

# model_type -> llama.cpp's architecture. These have gate, up and down matrices.
_GATED = {
    "llama": "llama",
    "mistral": "llama",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "stablelm": "stablelm",
}
_EXPERTS = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
}
_PLAIN = {"phi": "phi2", "gpt2": "gpt2"}
# What config.json calls a size, and what the same size is called in older families.
_OLD_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
_TIED = ("gemma", "gemma2", "gemma3", "gemma3_text", "gpt2")
_MAX = 1 << 31
_MAX_LAYERS = 512


class _Config:
    """A config.json, of which every size that is read is a sane number."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        text = body.get("text_config")
        self._body = {**body, **text} if isinstance(text, dict) else dict(body)

    def get(self, name: str, default: Any = None) -> Any:
        for key in (name, _OLD_NAMES.get(name, name)):
            if self._body.get(key) is not None:
                return self._body[key]
        return default

    def size(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if type(value) is not int or not 0 < value < _MAX:
            raise SourceError(
                f"config.json: '{name}' must be a positive integer, not {value!r:.40}"
            )
        return value


def header_of(config: Mapping[str, Any]) -> GgufHeader:
    """The header of a float GGUF of the model: F16 matrices, F32 vectors, no tokenizer.

    ``tensor_types.retyped`` makes any other type of it.
    Raises SourceError for sizes that are missing or absurd, UnsupportedModelError for a family
    whose shapes are not known here.
    """
    sizes = _Config(config)
    family = config.get("model_type")
    known = _GATED | _EXPERTS | _PLAIN
    if not isinstance(family, str) or family not in known:
        name = shown(str(family))
        raise UnsupportedModelError(
            f"the shapes of '{name}' models are not known", hint=did_you_mean(name, list(known))
        )
    if sizes.size("num_hidden_layers") > _MAX_LAYERS:
        raise SourceError(f"config.json: more than {_MAX_LAYERS} layers")
    architecture = known[family]
    metadata = {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in _metadata(family, sizes).items()},
    }
    tensors = tuple(
        GgufTensor(name, shape, kind, 0, _bytes(shape, kind))
        for name, shape, kind in _tensors(family, sizes)
    )
    size = sum(tensor.size_bytes for tensor in tensors)
    return GgufHeader(3, metadata, tensors, DEFAULT_ALIGNMENT, 0, size)


def _bytes(shape: tuple[int, ...], kind: str) -> int:
    count = 1
    for length in shape:
        count *= length
    return count * (2 if kind == "F16" else 4)


def _head(sizes: _Config) -> int:
    default = sizes.size("hidden_size") // sizes.size("num_attention_heads")
    return sizes.size("head_dim", max(1, default))


def _kv_heads(sizes: _Config) -> int:
    return sizes.size("num_key_value_heads", sizes.size("num_attention_heads"))


def _experts(family: str, sizes: _Config) -> tuple[int, int]:
    """How many there are, and how many a token uses; 0 without any."""
    if family not in _EXPERTS:
        return 0, 0
    count = sizes.size("num_local_experts" if family == "mixtral" else "num_experts")
    return count, min(count, sizes.size("num_experts_per_tok"))


def _feed_forward(sizes: _Config) -> int:
    return sizes.size("intermediate_size", 4 * sizes.size("hidden_size"))


def _metadata(family: str, sizes: _Config) -> dict[str, Any]:
    """The keys that costs depend on, without the architecture's prefix."""
    experts, used = _experts(family, sizes)
    found: dict[str, Any] = {
        "block_count": sizes.size("num_hidden_layers"),
        "context_length": sizes.size("max_position_embeddings", 4096),
        "embedding_length": sizes.size("hidden_size"),
        "feed_forward_length": _feed_forward(sizes),
        "attention.head_count": sizes.size("num_attention_heads"),
        "attention.head_count_kv": _kv_heads(sizes),
        "attention.key_length": _head(sizes),
        "attention.value_length": _head(sizes),
    }
    if experts:
        found |= {"expert_count": experts, "expert_used_count": used}
    # llama.cpp gives a window to the layers of these families alone.
    if family.startswith(("gemma2", "gemma3")):
        found["attention.sliding_window"] = sizes.size("sliding_window", 4096)
    return found


def _tensors(family: str, sizes: _Config) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape (the fastest dimension first) and type of every tensor."""
    width = sizes.size("hidden_size")
    vocabulary = sizes.size("vocab_size")
    yield "token_embd.weight", (width, vocabulary), "F16"
    if family == "gpt2":
        yield "position_embd.weight", (width, sizes.size("max_position_embeddings")), "F32"
    yield "output_norm.weight", (width,), "F32"
    tied = sizes.get("tie_word_embeddings", family in _TIED)
    if not (tied or family in _TIED):
        yield "output.weight", (width, vocabulary), "F16"
    for layer in range(sizes.size("num_hidden_layers")):
        for name, shape in _layer(family, sizes):
            yield f"blk.{layer}.{name}", shape, "F16" if len(shape) > 1 else "F32"


def _layer(family: str, sizes: _Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, head = sizes.size("hidden_size"), _head(sizes)
    queries = sizes.size("num_attention_heads") * head
    keys = _kv_heads(sizes) * head
    yield "attn_norm.weight", (width,)
    if family != "phi":
        yield "ffn_norm.weight", (width,)
    if family in ("phi3", "gpt2"):
        yield "attn_qkv.weight", (width, queries + 2 * keys)
    else:
        yield "attn_q.weight", (width, queries)
        yield "attn_k.weight", (width, keys)
        yield "attn_v.weight", (width, keys)
    if family in ("qwen2", "qwen2_moe"):
        yield from (("attn_q.bias", (queries,)), ("attn_k.bias", (keys,)), ("attn_v.bias", (keys,)))
    yield "attn_output.weight", (queries, width)
    yield from _layer_feed_forward(family, sizes)


def _layer_feed_forward(family: str, sizes: _Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = sizes.size("hidden_size"), _feed_forward(sizes)
    experts, _ = _experts(family, sizes)
    if experts:
        inner = sizes.size("moe_intermediate_size", inner)
        yield "ffn_gate_inp.weight", (width, experts)
        yield "ffn_gate_exps.weight", (width, inner, experts)
        yield "ffn_up_exps.weight", (width, inner, experts)
        yield "ffn_down_exps.weight", (inner, width, experts)
        if family == "qwen2_moe":
            shared = sizes.size("shared_expert_intermediate_size")
            yield "ffn_gate_shexp.weight", (width, shared)
            yield "ffn_up_shexp.weight", (width, shared)
            yield "ffn_down_shexp.weight", (shared, width)
        return
    if family == "phi3":
        yield "ffn_up.weight", (width, 2 * inner)
    else:
        if family in _GATED:
            yield "ffn_gate.weight", (width, inner)
        yield "ffn_up.weight", (width, inner)
    yield "ffn_down.weight", (inner, width)
