"""Rotary positions of a config.json, in the words of transformers 4 and of transformers 5.

Knows how both spell a base and a scaling, and what a scaling does to the frequencies; never picks
one when the file contradicts itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters.arch.config import Config, finite
from edgekit.exporters.arch.decoder import Rotation

# What each scaling may say. Another key could change the rotation in a way that we would drop.
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "longrope": {"short_factor", "long_factor", "original_max_position_embeddings", "factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
    },
}
_ALWAYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
_OLD_NAMES = {"su": "longrope"}

# What config.json calls a number of yarn, and what GGUF calls it below "rope.scaling."; both may
# leave it out.
YARN_NUMBERS = {
    "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


@dataclass(frozen=True)
class Rope:
    """``theta`` is the base of the frequencies; ``scaling`` names what ``values`` belong to.

    ``rotated`` is the share of each head that turns. ``local_theta`` is the base of the layers with
    a sliding window, where they have their own.
    """

    theta: float
    scaling: str = "default"
    values: Mapping[str, Any] = field(default_factory=dict)
    rotated: float = 1.0
    local_theta: float | None = None

    def number(self, key: str) -> float:
        """A number of the scaling; SourceError where it is missing."""
        return finite(f"rope_parameters.{key}", self.values.get(key))

    def integer(self, key: str) -> int:
        """A whole number of the scaling; SourceError where it is missing."""
        value = self.number(key)
        if value != int(value):
            raise SourceError(f"config.json: 'rope_parameters.{key}' must be whole, not {value}")
        return int(value)

    def numbers(self, key: str) -> list[float]:
        """A list of numbers of the scaling; SourceError where it is missing."""
        value = self.values.get(key)
        if not isinstance(value, list):
            raise SourceError(f"config.json: 'rope_parameters.{key}' must be a list")
        return [finite(f"rope_parameters.{key}", each) for each in value]

    def llama3_divisors(self, head_dim: int) -> NDArray[np.float32]:
        """What each rotary frequency is divided by, float32 [head_dim / 2].

        Long waves are divided by ``factor``, short ones stay, those between are blended; see
        ``_compute_llama3_parameters`` of transformers' modeling_rope_utils.py.
        """
        factor = self.number("factor")
        low = self.number("low_freq_factor")
        high = self.number("high_freq_factor")
        trained = self.number("original_max_position_embeddings")
        if not (factor > 0 and 0 < low < high and trained > 0):
            raise UnsupportedModelError("llama3 rope scaling needs 0 < low_freq_factor < high")
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        # In float32 and in this order, so that the bits are those of llama.cpp's own conversion.
        frequencies = np.float32(1) / np.float32(self.theta) ** exponents
        divisors = []
        for wave in np.float32(2 * math.pi) / frequencies:
            if wave < trained / high:
                divisors.append(np.float32(1))
            elif wave > trained / low:
                divisors.append(np.float32(factor))
            else:
                kept = (np.float32(trained) / wave - np.float32(low)) / np.float32(high - low)
                blend = (np.float32(1) - kept) / np.float32(factor) + kept
                divisors.append(np.float32(1) / blend)
        return np.array(divisors, dtype=np.float32)

    def rotation(self, head_dim: int, context_length: int = 0, trained_length: int = 0) -> Rotation:
        """Frequencies for heads of ``head_dim`` values, as transformers' modeling_rope_utils.py.

        longrope turns by its short factors: the model is to be run within ``trained_length``.
        """
        turning = int(self.rotated * head_dim) // 2
        exponents = np.arange(0, turning, dtype=np.float32) * np.float32(2)
        exponents /= np.float32(2 * turning)
        plain: NDArray[np.float32] = np.float32(1) / np.float32(self.theta) ** exponents
        if self.scaling == "linear":
            return Rotation(plain / np.float32(self.number("factor")))
        if self.scaling == "llama3":
            return Rotation(plain / self.llama3_divisors(head_dim))
        if self.scaling == "longrope":
            factors = np.array(self.numbers("short_factor"), np.float32)
            if len(factors) != turning:
                raise SourceError(f"config.json: short_factor must have {turning} values")
            return Rotation(plain / factors, attention_factor(context_length, trained_length))
        if self.scaling == "yarn":
            return self._yarn(plain)
        return Rotation(plain)

    def local_rotation(self, head_dim: int) -> Rotation | None:
        """That of layers with a window, where they have a base of their own."""
        if self.local_theta is None:
            return None
        return Rope(self.local_theta, rotated=self.rotated).rotation(head_dim)

    def _yarn(self, plain: NDArray[np.float32]) -> Rotation:
        """Frequencies that turn often in the trained length stay, slow ones are stretched, those
        between are blended: https://arxiv.org/abs/2309.00071, section 3.2.
        """
        factor = self.number("factor")
        trained = self.number("original_max_position_embeddings")
        turning = len(plain)

        def place(key: str, default: float) -> float:
            turns = self.number(key) if key in self.values else default
            return turning * math.log(trained / (turns * 2 * math.pi)) / math.log(self.theta)

        if not (factor > 0 and trained > 0 and self.theta > 1):
            raise UnsupportedModelError("yarn needs a factor, a trained length and a base above 1")
        low = max(math.floor(place("beta_fast", 32)), 0)
        high = min(math.ceil(place("beta_slow", 1)), 2 * turning - 1)
        ramp = np.clip((np.arange(turning) - low) / max(high - low, 1e-3), 0, 1)
        blended = plain / factor * ramp + plain * (1 - ramp)
        stretch = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        scale = self.number("attention_factor") if "attention_factor" in self.values else stretch
        return Rotation(blended.astype(np.float32), scale)


def read(config: Config, *scalings: str) -> Rope:
    """The rotary positions of a model.

    ``scalings`` are the kinds that the family has in llama.cpp, besides "default".
    Raises SourceError where two spellings disagree, UnsupportedModelError for any other scaling.
    """
    nested = _mapping(config, "rope_parameters")
    whole, local = nested, {}
    if "full_attention" in nested or "sliding_attention" in nested:
        whole = _mapping_in(nested, "full_attention")
        local = _mapping_in(nested, "sliding_attention")
        if (local_kind := _kind(local)) != "default":
            raise UnsupportedModelError(f"rope scaling '{local_kind}' on sliding layers")
    old = _mapping(config, "rope_scaling")
    kind = _agree("rope_type", _kind(whole) if whole else None, _kind(old) if old else None)
    kind = kind or "default"
    if kind not in {"default", *scalings}:
        raise UnsupportedModelError(
            f"rope scaling '{kind}' is not known for {config.family} models",
            hint=f"known: {', '.join(['default', *scalings])}",
        )
    values = dict(old)
    for key, value in whole.items():
        values[key] = _agree(key, value, values.get(key))
    strange = {key for key, v in values.items() if v is not None} - _ALWAYS - _KEYS[kind]
    # transformers 5 writes the trained length beside every scaling, where it changes nothing.
    strange -= {"original_max_position_embeddings"}
    if strange:
        raise UnsupportedModelError(
            f"rope scaling '{kind}' with '{sorted(strange)[0]}' is not supported"
        )
    theta = _agree("rope_theta", values.get("rope_theta"), config.get("rope_theta"))
    rotated = _agree(
        "partial_rotary_factor",
        values.get("partial_rotary_factor"),
        config.get("partial_rotary_factor"),
    )
    local_theta = _agree(
        "rope_local_base_freq", local.get("rope_theta"), config.get("rope_local_base_freq")
    )
    return Rope(
        theta=finite("rope_theta", config.get("default_rope_theta") if theta is None else theta),
        scaling=kind,
        values={key: v for key, v in values.items() if v is not None},
        rotated=1.0 if rotated is None else finite("partial_rotary_factor", rotated),
        local_theta=None if local_theta is None else finite("rope_local_base_freq", local_theta),
    )


def attention_factor(context_length: int, trained_length: int) -> float:
    """How much longer queries and keys become: sqrt(1 + ln(s) / ln(L)), s = context / L.

    LongRoPE, https://arxiv.org/abs/2402.13753.
    Raises UnsupportedModelError for a trained length whose logarithm is no divisor.
    """
    if trained_length < 2:
        raise UnsupportedModelError(f"longrope models trained for {trained_length} positions")
    stretch = context_length / trained_length
    if stretch <= 1:
        return 1.0
    return math.sqrt(1 + math.log(stretch) / math.log(trained_length))


def _mapping(config: Config, key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SourceError(f"config.json: '{key}' must be a mapping")
    return value


def _mapping_in(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key) or {}
    if not isinstance(value, dict):
        raise SourceError(f"config.json: 'rope_parameters.{key}' must be a mapping")
    return value


def _kind(values: Mapping[str, Any]) -> str:
    kind = str(values.get("rope_type") or values.get("type") or "default").lower()
    return _OLD_NAMES.get(kind, kind)


def _agree(key: str, new: Any, old: Any) -> Any:
    """The one value that both spellings give."""
    if new is not None and old is not None and new != old:
        raise SourceError(
            f"config.json contradicts itself: {key} is {new!r} in one place, {old!r} in another",
            hint="keep the value that the model was trained with",
        )
    return old if new is None else new
