"""Llama, Qwen, GPT-2, Phi and Gemma in Hugging Face terms: the way back of exporters/arch.

Knows each family's names and how llama.cpp stores what it changes; never opens a file.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from edgekit.errors import UnsupportedModelError
from edgekit.exporters.arch.gemma3 import layer_types, query_scale
from edgekit.exporters.arch.rope import Rope, attention_factor
from edgekit.exporters.to_hf_layout import Array, Destination, Layout, ReadTensor
from edgekit.formats.foreign import shown
from edgekit.formats.gguf import GgufHeader
from edgekit.registry import did_you_mean


class Llama(Layout):
    """Llama 2 and 3, TinyLlama, SmolLM2: the rows of a head go back into transformers' order."""

    model_type = "llama"
    model_class = "LlamaForCausalLM"
    spoken = ("rope_freqs.weight",)
    top: ClassVar[dict[str, str]] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    block: ClassVar[dict[str, str]] = {
        "": "model.layers",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }

    def own_config(self) -> dict[str, Any]:
        if self.integer("rope.dimension_count", self.head_dim) != self.head_dim:
            raise UnsupportedModelError("llama models that turn a part of each head only")
        if any(name.endswith(".bias") for name in self.names):
            raise UnsupportedModelError("llama models with biases")
        return {
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "attention_bias": False,
            "mlp_bias": False,
        }

    def adapt(self, stem: str, name: str) -> Destination:
        change = self._halves if stem in ("attn_q", "attn_k") else None
        return Destination(name, change)

    def _halves(self, rows: Array) -> Array:
        """Undo llama.cpp's order of a head's rows: it turns 2i with 2i + 1 (RoFormer,
        https://arxiv.org/abs/2104.09864), transformers turns i with i + head_dim/2.
        """
        pairs = rows.reshape(-1, self.head_dim // 2, 2, *rows.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))

    def rope_scaling(self) -> dict[str, Any] | None:
        if "rope_freqs.weight" not in self.names:
            return super().rope_scaling()
        divisors = self.read("rope_freqs.weight").reshape(-1)
        theta = self.number("rope.freq_base", 10000.0)
        for scaling in _LLAMA3_SCALINGS:
            known = Rope(theta, "llama3", scaling).llama3_divisors(self.head_dim)
            if known.shape == divisors.shape and np.allclose(known, divisors, rtol=1e-5):
                return {"rope_type": "llama3", **scaling}
        raise UnsupportedModelError(
            "the rope factors of this file are not those of a released Llama 3",
            hint="transformers has no form for factors of one's own",
        )


# The file holds the resulting divisors only; these are the numbers of all releases of Llama 3.1
# to 3.3, from the config.json of each.
_LLAMA3_SCALINGS: tuple[dict[str, float | int], ...] = tuple(
    {
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)


class Qwen2(Layout):
    """Qwen2 and Qwen2.5: Llama's names, with heads in the same order in both formats."""

    model_type = "qwen2"
    model_class = "Qwen2ForCausalLM"
    top = Llama.top
    block = Llama.block

    def own_config(self) -> dict[str, Any]:
        return {
            "hidden_act": "silu",
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "use_sliding_window": False,
        }


class Qwen3(Qwen2):
    """Qwen3 (dense): the norms of its heads have names of their own."""

    model_type = "qwen3"
    model_class = "Qwen3ForCausalLM"
    block: ClassVar[dict[str, str]] = {
        **Llama.block,
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
    }

    def own_config(self) -> dict[str, Any]:
        biased = "blk.0.attn_q.bias" in self.names
        return {**super().own_config(), "head_dim": self.head_dim, "attention_bias": biased}


class Gpt2(Layout):
    """GPT-2: another set of keys in config.json, and matrices stored the other way round."""

    model_type = "gpt2"
    model_class = "GPT2LMHeadModel"
    top: ClassVar[dict[str, str]] = {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    }
    block: ClassVar[dict[str, str]] = {
        "": "transformer.h",
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    }

    def adapt(self, stem: str, name: str) -> Destination:
        # transformers keeps GPT-2's matrices as the original did: inputs first.
        if name.endswith(".weight") and stem in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
            return Destination(name, lambda rows: np.ascontiguousarray(rows.T), transposed=True)
        return Destination(name)

    def config(self) -> dict[str, Any]:
        context = self.integer("context_length")
        return {
            "architectures": [self.model_class],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "n_embd": self.width,
            "n_inner": self.integer("feed_forward_length"),
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_positions": context,
            "n_ctx": context,
            "layer_norm_epsilon": self.number("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
            "tie_word_embeddings": self.tied,
        }


class Phi2(Layout):
    """Phi-1, Phi-1.5 and Phi-2: heads that turn in part."""

    model_type = "phi"
    model_class = "PhiForCausalLM"
    top: ClassVar[dict[str, str]] = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.final_layernorm",
        "output": "lm_head",
    }
    block: ClassVar[dict[str, str]] = {
        "": "model.layers",
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.dense",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    }

    def own_config(self) -> dict[str, Any]:
        return {
            "hidden_act": "gelu_new",
            "layer_norm_eps": self.number("attention.layer_norm_epsilon"),
            "qk_layernorm": False,
            "partial_rotary_factor": self.turning / self.head_dim,
        }

    @property
    def turning(self) -> int:
        """How many values of a head turn."""
        return self.integer("rope.dimension_count", self.head_dim)

    def rope_config(self) -> dict[str, Any]:
        config = super().rope_config()
        config["rope_parameters"]["partial_rotary_factor"] = self.turning / self.head_dim
        return config


class Phi3(Phi2):
    """Phi-3, Phi-3.5 and Phi-4: the factors of a long context come back from their tensors."""

    model_type = "phi3"
    model_class = "Phi3ForCausalLM"
    spoken = ("rope_factors_long.weight", "rope_factors_short.weight")
    top = Llama.top
    block: ClassVar[dict[str, str]] = {
        "": "model.layers",
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    }

    @property
    def _trained_length(self) -> int:
        return self.integer("rope.scaling.original_context_length", self.integer("context_length"))

    def own_config(self) -> dict[str, Any]:
        return {
            "hidden_act": "silu",
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "partial_rotary_factor": self.turning / self.head_dim,
            "original_max_position_embeddings": self._trained_length,
            "sliding_window": self.value("attention.sliding_window", 0) or None,
        }

    def rope_scaling(self) -> dict[str, Any] | None:
        if "rope_factors_long.weight" not in self.names:
            return super().rope_scaling()
        expected = attention_factor(self.integer("context_length"), self._trained_length)
        if not math.isclose(
            self.number("rope.scaling.attn_factor", expected), expected, rel_tol=1e-4
        ):
            raise UnsupportedModelError("phi3 models with an attention factor of their own")
        # transformers 4 refuses the mapping of this family with any other key than these.
        return {
            "type": "longrope",
            "long_factor": self._factors("long"),
            "short_factor": self._factors("short"),
        }

    def _factors(self, kind: str) -> list[float]:
        values = self.read(f"rope_factors_{kind}.weight").reshape(-1)
        return [float(str(value)) for value in values]

    def rope_config(self) -> dict[str, Any]:
        config = super().rope_config()
        parameters = config["rope_parameters"]
        parameters["original_max_position_embeddings"] = self._trained_length
        if kind := parameters.pop("type", None):
            parameters["rope_type"] = kind
        return config


class Gemma3(Layout):
    """The text model; a file of the whole one holds no more than that either."""

    model_type = "gemma3_text"
    model_class = "Gemma3ForCausalLM"
    top = Llama.top
    block: ClassVar[dict[str, str]] = {
        **Qwen3.block,
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }

    def adapt(self, stem: str, name: str) -> Destination:
        # llama.cpp multiplies by the weight, transformers by 1 + weight.
        return Destination(name, _minus_one if stem.endswith("norm") else None)

    def own_config(self) -> dict[str, Any]:
        capped = f"{self.header.architecture}.final_logit_softcapping" in self.header.metadata
        return {
            "head_dim": self.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "query_pre_attn_scalar": query_scale(
                self.layers, self.width, self.heads, self.head_dim
            ),
            "sliding_window": self.integer("attention.sliding_window"),
            "layer_types": layer_types(self.layers),
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": self.number("final_logit_softcapping") if capped else None,
        }

    def rope_config(self) -> dict[str, Any]:
        config = super().rope_config()
        local = self.number("rope.freq_base_swa", 10000.0)
        return config | {
            "rope_local_base_freq": local,
            "rope_parameters": {
                "full_attention": config["rope_parameters"],
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        }


def _minus_one(gain: Array) -> Array:
    return gain - np.float32(1)


LAYOUTS: dict[str, type[Layout]] = {
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "gpt2": Gpt2,
    "phi2": Phi2,
    "phi3": Phi3,
    "gemma3": Gemma3,
}


def layout(header: GgufHeader, read: ReadTensor) -> Layout:
    """The layout of the file's architecture; UnsupportedModelError for any other."""
    family = header.architecture
    if family not in LAYOUTS:
        raise UnsupportedModelError(
            f"GGUF files of the architecture {shown(family)} cannot be converted",
            hint=did_you_mean(family, list(LAYOUTS)),
        )
    return LAYOUTS[family](header, read)
