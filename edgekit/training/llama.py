"""A Llama in plain torch, with the names and numbers of Hugging Face's LlamaForCausalLM.

Knows the architecture alone: RMSNorm before each part, rotary positions, grouped queries, SwiGLU,
tied embeddings. Its state dict is a model.safetensors that transformers and edgekit export read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgekit.training.experts import SparseExperts

_ROPE_THETA = 10_000.0
_RMS_EPS = 1e-5
_SHORT = 512  # tokens; longer pieces would need much memory for their products


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: width, width of the feed-forward part, blocks, heads of queries, heads of
    keys and values, and entries of the vocabulary. With ``experts`` each block has so many
    feed-forward parts, of which a token takes ``chosen`` (edgekit.training.experts).
    """

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    experts: int = 0
    chosen: int = 2
    capacity: float = 1.25

    @property
    def head(self) -> int:
        return self.width // self.heads

    @property
    def matrices(self) -> int:
        """Weights that each token is multiplied with; the tied table counts once, as the output."""
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_heads * self.head
        feed = 3 * self.width * self.inner
        if self.experts:
            feed = self.chosen * feed + self.width * self.experts
        return self.layers * (attention + feed) + self.width * self.vocab

    def train_flops(self, length: int) -> float:
        """Operations to train on one token of a text of ``length``: 6 a weight, and 12 a layer,
        channel and position for attention, of which a causal mask needs half (Chowdhery et al.
        2022, PaLM, appendix B).
        """
        return 6.0 * self.matrices + 6.0 * self.layers * self.width * length

    def config(self, n_ctx: int, specials: Mapping[str, int]) -> dict[str, Any]:
        """The config.json of such a model; both spellings of the rotary base, for old readers. With
        experts it is a Mixtral, which is a Llama but for them.
        """
        kind: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if self.experts:
            kind = {
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "num_local_experts": self.experts,
                "num_experts_per_tok": self.chosen,
                "sliding_window": None,
            }
        return {
            **kind,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head,
            "vocab_size": self.vocab,
            "max_position_embeddings": n_ctx,
            "rms_norm_eps": _RMS_EPS,
            "rope_theta": _ROPE_THETA,
            "rope_parameters": {"rope_type": "default", "rope_theta": _ROPE_THETA},
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "dtype": "float32",
            "torch_dtype": "float32",
            **specials,
        }


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), _RMS_EPS)


class Attention(nn.Module):
    """Each group of query heads shares one head of keys and values (Ainslie et al. 2023, GQA,
    section 2.2).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, kv, bias=False)
        self.v_proj = nn.Linear(shape.width, kv, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, length, width = x.shape

        def heads(values: torch.Tensor) -> torch.Tensor:
            return values.view(batch, length, -1, self.shape.head).transpose(1, 2)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        q, k = rotated(q, turns), rotated(k, turns)
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = mixed_values(q, k, v)
        found: torch.Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        return found


def mixed_values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(head)) v, each position with itself and those before it alone (Vaswani
    et al. 2017, equation 1): [batch, heads, length, head].

    Torch's fused form is twice as slow on a CPU for short pieces, most of it in the way back.
    """
    batch, heads, length, head = q.shape
    if q.device.type != "cpu" or length > _SHORT:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    q, k, v = (each.reshape(batch * heads, length, head) for each in (q * head**-0.5, k, v))
    later = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
    found = torch.baddbmm(later, q, k.transpose(1, 2)).softmax(-1) @ v
    return found.view(batch, heads, length, head)


def rotated(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Pairs of channels turned by an angle that grows with the position (Su et al. 2021, RoFormer,
    equation 34); a channel's partner lies half a head away, as in Hugging Face's layout.
    """
    cos, sin = (each.to(x.dtype) for each in turns)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020, equation 6)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.width)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.width)
        if shape.experts:
            sizes = (shape.width, shape.inner, shape.experts, shape.chosen)
            self.block_sparse_moe = SparseExperts(*sizes, shape.capacity)
        else:
            self.mlp = FeedForward(shape)

    def forward(self, x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turns)
        feed = self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp
        found: torch.Tensor = x + feed(self.post_attention_layernorm(x))
        return found


class Trunk(nn.Module):
    """Embedding, blocks, last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width)


class Llama(nn.Module):
    """int64 ids [batch, length] -> logits [batch, length, vocab]; both ends share a table."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        # Normal, and narrower where a block adds to the stream (Radford et al. 2019, section 2.3).
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                ends = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
                nn.init.normal_(weight, std=0.02 / ((2 * shape.layers) ** 0.5 if ends else 1.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        trunk, head = self.model, self.shape.head
        half = torch.arange(0, head, 2, device=ids.device, dtype=torch.float32)
        position = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angles = torch.outer(position, _ROPE_THETA ** (-half / head)).repeat(1, 2)
        turns = (angles.cos(), angles.sin())
        x = trunk.embed_tokens(ids)
        for layer in trunk.layers:
            x = layer(x, turns)
        return F.linear(trunk.norm(x), trunk.embed_tokens.weight)
