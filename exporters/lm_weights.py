"""The weights of a decoder, part by part: pieces stacked, heads in the graph's order, in float32.

Knows where a Hugging Face folder keeps what a Decoder names; never a format or a type of weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.errors import SourceError
from edgekit.exporters import hf_weights
from edgekit.exporters.arch.decoder import Decoder
from edgekit.source import ModelSource

Array = np.ndarray[Any, np.dtype[np.float32]]

MATRICES = ("qkv", "output", "gate_up", "down")
EMBEDDING, HEAD = "embedding", "head"


def names(decoder: Decoder) -> list[str]:
    """Every matrix of a decoder in the order of the graph; a tied head is none."""
    layers = [f"{i}.{part}" for i in range(decoder.layers) for part in MATRICES]
    return [EMBEDDING, *layers, *([] if decoder.tied else [HEAD])]


def shape(decoder: Decoder, name: str) -> tuple[int, int]:
    """[outputs, inputs] of a matrix."""
    if name in (EMBEDDING, HEAD):
        return decoder.vocab_size, decoder.width
    attention = decoder.heads * decoder.head_dim
    return {
        "qkv": (attention + 2 * decoder.kv_heads * decoder.head_dim, decoder.width),
        "output": (decoder.width, attention),
        "gate_up": ((1 + decoder.gated) * decoder.inner, decoder.width),
        "down": (decoder.width, decoder.inner),
    }[name.partition(".")[2]]


class Weights:
    """Reads one part at a time; nothing is kept."""

    def __init__(self, decoder: Decoder, source: ModelSource) -> None:
        """Raises SourceError for a folder that lacks a part, or has one in another shape."""
        self.decoder = decoder
        # Models that see as well keep their language model one level deeper.
        found = hf_weights.find(source)
        self._found = {name.replace("language_model.", ""): found[name] for name in found}
        self._check()

    def matrix(self, name: str) -> Array:
        """[outputs, inputs] of "embedding", "head" or "LAYER.PART"."""
        if name in (EMBEDDING, HEAD):
            tied = name == EMBEDDING or self.decoder.tied
            stored = self.decoder.embedding_name if tied else self.decoder.head_name
            return self._read(f"{stored}.weight")
        layer, _, part = name.partition(".")
        return self._stacked(int(layer), part, "weight")

    def bias(self, name: str) -> Array | None:
        """[outputs] of the matrix ``name``, None where it has none."""
        if name == HEAD:
            stored = f"{self.decoder.head_name}.bias"
            return self._read(stored) if stored in self._found and not self.decoder.tied else None
        layer, _, part = name.partition(".")
        if f"{self.decoder.names(int(layer), part)[0]}.bias" not in self._found:
            return None
        return self._stacked(int(layer), part, "bias")

    def gain(self, name: str) -> Array:
        """What a norm multiplies by: "final" or "LAYER.PART"."""
        return self._read(f"{self._norm(name)}.weight") + np.float32(self.decoder.gain_offset)

    def shift(self, name: str) -> Array | None:
        """What a norm adds; None where it adds nothing."""
        stored = f"{self._norm(name)}.bias"
        return self._read(stored) if stored in self._found else None

    def _norm(self, name: str) -> str:
        if name == "final":
            return self.decoder.final_norm_name
        layer, _, part = name.partition(".")
        return self.decoder.names(int(layer), part)[0]

    def _stacked(self, layer: int, part: str, kind: str) -> Array:
        names = self.decoder.names(layer, part)
        whole = np.concatenate([self._read(f"{name}.{kind}") for name in names])
        return self._turned(whole, layer) if part == "qkv" else whole

    def _turned(self, rows: Array, layer: int) -> Array:
        """Where only the first values of a head turn: the rows of queries and keys in an order in
        which the halves layout pairs those that turn together. Products of queries and keys stay.
        """
        decoder = self.decoder
        turning, half = decoder.rotation_of(layer).turning, decoder.head_dim // 2
        if turning == half:
            return rows
        still = np.arange(2 * turning, decoder.head_dim)
        first, second = np.split(still, 2)
        order = np.concatenate([np.arange(turning), first, np.arange(turning, 2 * turning), second])
        count = decoder.heads + decoder.kv_heads
        turned = count * decoder.head_dim
        heads = rows[:turned].reshape(count, decoder.head_dim, *rows.shape[1:])[:, order]
        return np.concatenate([heads.reshape(turned, *rows.shape[1:]), rows[turned:]])

    def _read(self, name: str) -> Array:
        weight = self._found.get(name)
        if weight is None:
            raise SourceError(f"the weights are incomplete: there is no '{name}'")
        (bits,) = hf_weights.blocks(weight, 0)
        return hf_weights.to_float32(bits, weight.dtype).copy()

    def names(self) -> list[str]:
        """Every matrix that is stored, in the order of the graph."""
        return names(self.decoder)

    def _check(self) -> None:
        for name in self.names():
            if name in (EMBEDDING, HEAD):
                stored = [getattr(self.decoder, f"{name}_name")]
            else:
                layer, _, part = name.partition(".")
                stored = list(self.decoder.names(int(layer), part))
            shapes = []
            for each in stored:
                weight = self._found.get(f"{each}.weight")
                if weight is None:
                    raise SourceError(f"the weights are incomplete: there is no '{each}.weight'")
                shapes.append(weight.shape)
            rows = sum(shape[0] for shape in shapes)
            wanted = shape(self.decoder, name)
            if any(len(shape) != 2 or shape[1] != wanted[1] for shape in shapes):
                raise SourceError(
                    f"'{stored[0]}.weight' is {list(shapes[0])}, not [n, {wanted[1]}]"
                )
            if rows != wanted[0]:
                raise SourceError(f"'{stored[0]}' and its kin have {rows} rows, not {wanted[0]}")
