"""The weights of a decoder with columns of equal worth: the same function, easier to round.

Knows which scale of a matrix's inputs another part of the model can take up; never a text.

A column that is multiplied by s, and whose input is divided by s, changes nothing. Inputs come from
a norm, whose gain takes the division, or from rows of values and of "up" (as in AWQ,
https://arxiv.org/abs/2306.00978). Blocks share a step, so an error of a column costs its input's
power d over s squared, and the step grows with the columns' power w times s squared: their product
is least (Cauchy and Schwarz) where s to the fourth is d / w.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgekit.exporters.lm_blocks import Array
from edgekit.exporters.lm_weights import EMBEDDING, HEAD, Weights

_STRENGTH = 0.25
_MOST = 8.0  # times the mean of its block, up or down


class Equalized:
    """``Weights`` whose layers were scaled (``scale``); what is not scaled is as it was."""

    def __init__(self, weights: Weights) -> None:
        self.decoder = weights.decoder
        self._weights = weights
        self._scales: dict[str, Array] = {}

    def scale(
        self, layer: int, powers: Mapping[str, Array], sizes: Mapping[str, int]
    ) -> dict[str, Array]:
        """Choose scales for the inputs of a layer's matrices, and use them from now on.

        ``powers`` holds for each matrix that is to be equalized the summed squares of its inputs,
        [inputs], and ``sizes`` the inputs of a block. Gives what its inputs are divided by,
        [inputs], for every matrix that has any.
        """
        decoder = self.decoder
        for part, power in powers.items():
            if part == "down" and not decoder.gated:
                continue  # an activation that is not linear stands in between
            if part in ("qkv", "gate_up") and decoder.parallel:
                continue  # both read one norm
            columns = np.square(self._weights.matrix(f"{layer}.{part}")).sum(axis=0)
            if part == "output":
                self._scales[f"{layer}.{part}"] = self._of_heads(power, columns, sizes[part])
            else:
                self._scales[f"{layer}.{part}"] = _scale(power, columns, sizes[part])
        names = [f"{layer}.{part}" for part in powers]
        return {name.partition(".")[2]: self._of(name) for name in names if name in self._scales}

    def _of_heads(self, power: Array, columns: Array, size: int) -> Array:
        """[kv heads x head]: the query heads of a group read the same values."""
        shape = (self.decoder.kv_heads, -1, self.decoder.head_dim)
        power, columns = (each.reshape(shape).sum(axis=1).ravel() for each in (power, columns))
        return _scale(power, columns, size)

    def _of(self, name: str) -> Array:
        """What the inputs of a matrix are divided by, [inputs]."""
        found = self._scales[name]
        if not name.endswith(".output"):
            return found
        decoder = self.decoder
        heads = found.reshape(decoder.kv_heads, 1, decoder.head_dim)
        repeated: Array = np.repeat(heads, decoder.heads // decoder.kv_heads, axis=1).ravel()
        return repeated

    # What Weights offers

    def names(self) -> list[str]:
        """Every matrix that is stored, in the order of the graph."""
        return self._weights.names()

    def matrix(self, name: str) -> Array:
        """[outputs, inputs] of "embedding", "head" or "LAYER.PART"."""
        found = self._weights.matrix(name)
        if name in (EMBEDDING, HEAD):
            return found
        self._divide_rows(name, found)
        if name in self._scales:
            found *= self._of(name)
        return found

    def bias(self, name: str) -> Array | None:
        """[outputs] of the matrix ``name``, None where it has none."""
        found = self._weights.bias(name)
        if found is not None and name != HEAD:
            self._divide_rows(name, found)
        return found

    def gain(self, name: str) -> Array:
        """What a norm multiplies by: "final" or "LAYER.PART"."""
        return self._over(name, self._weights.gain(name))

    def shift(self, name: str) -> Array | None:
        """What a norm adds; None where it adds nothing."""
        found = self._weights.shift(name)
        return None if found is None else self._over(name, found)

    def _over(self, norm: str, values: Array) -> Array:
        """Of a norm, over the scale of the matrix that reads it."""
        layer, _, part = norm.partition(".")
        reader = {"norm": "qkv", "mlp_norm": "gate_up"}.get(part)
        scale = self._scales.get(f"{layer}.{reader}")
        divided: Array = values if scale is None else values / scale
        return divided

    def _divide_rows(self, name: str, rows: Array) -> None:
        """The last rows of "qkv" are values, those of "gate_up" are "up"."""
        layer, _, part = name.partition(".")
        reader = {"qkv": "output", "gate_up": "down"}.get(part)
        scale = self._scales.get(f"{layer}.{reader}")
        if scale is not None:
            rows[-len(scale) :] /= scale.reshape(-1, *[1] * (rows.ndim - 1))


def _scale(power: Array, columns: Array, size: int) -> Array:
    """s of every input, float32; of each block the mean is 1, for its step takes up the rest."""
    floor = np.float32(1e-30)
    power = np.maximum(power, max(floor, 1e-6 * power.mean()))
    columns = np.maximum(columns, max(floor, 1e-6 * columns.mean()))
    logs = _STRENGTH * (np.log(power) - np.log(columns))
    for start in range(0, len(logs), size):
        logs[start : start + size] -= logs[start : start + size].mean()
    found: Array = np.exp(np.clip(logs, -np.log(_MOST), np.log(_MOST))).astype(np.float32)
    return found
