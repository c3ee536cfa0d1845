"""Blocks of weights in 4 or 8 bits: the scale and zero point that lose least, and how they lie.

Knows arrays alone; never a model. w = scale (q - zero), scales in float16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.exporters.lm_graph import Blocks

_SHRINKS = np.linspace(1.0, 0.64, 10)  # parts of a block's range that are tried
_TINY = np.float32(6e-8)  # the smallest float16: a scale is never 0

Array = np.ndarray[Any, np.dtype[Any]]


def grid(values: Array, importance: Array, bits: int) -> tuple[Array, Array]:
    """(scales, zeros) of blocks, float32 [..., 1] each, for ``values`` float32 [..., size].

    They minimise the squared error weighted by ``importance``, which broadcasts over ``values``:
    of several parts of the range, each with the scale that fits its rounded values best (least
    squares), the best is kept. In 8 bits the zero point is the middle. Scales are those of float16.
    """
    top = (1 << bits) - 1
    if bits == 8:
        middle = np.float32(128)
        high = np.abs(values).max(axis=-1, keepdims=True)
        return halved(high / 127), np.full_like(high, middle)
    low = np.minimum(values.min(axis=-1, keepdims=True), 0)
    high = np.maximum(values.max(axis=-1, keepdims=True), 0)
    least = np.full(low.shape, np.inf, np.float32)
    scales, zeros = np.ones_like(least), np.zeros_like(least)
    for shrink in _SHRINKS:
        scale = halved((high - low) * np.float32(shrink / top))
        zero = np.clip(np.rint(-low * np.float32(shrink) / scale), 0, top)
        steps = np.clip(np.rint(values / scale), -zero, top - zero)
        fitted = steps * importance
        scale = halved(
            (fitted * values).sum(axis=-1, keepdims=True)
            / np.maximum((fitted * steps).sum(axis=-1, keepdims=True), _TINY)
        )
        steps = np.clip(np.rint(values / scale), -zero, top - zero)
        steps *= scale
        steps -= values
        steps *= steps
        error = (steps * importance).sum(axis=-1, keepdims=True)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(scales, scale, where=better)
        np.copyto(zeros, zero, where=better)
    return scales, zeros


def halved(scale: Array) -> Array:
    """The nearest float16 above 0, as float32."""
    with np.errstate(over="ignore"):
        half = np.maximum(np.abs(scale), _TINY).astype(np.float16)
    return np.minimum(half.astype(np.float32), np.float32(65504))


def rounded(values: Array, scales: Array, zeros: Array, bits: int) -> Array:
    """q of every value, float32."""
    top = np.float32((1 << bits) - 1)
    found: Array = np.clip(np.rint(values / scales) + zeros, 0, top)
    return found


def split(weights: Array, size: int) -> Array:
    """float32 [outputs, inputs] as [outputs, blocks, size], the last block filled up with 0."""
    outputs, inputs = weights.shape
    blocks = -(-inputs // size)
    if blocks * size != inputs:
        weights = np.pad(weights, ((0, 0), (0, blocks * size - inputs)))
    return weights.reshape(outputs, blocks, size)


def pack(q: Array, scales: Array, zeros: Array, bits: int, inputs: int) -> Blocks:
    """``q`` [outputs, blocks, size], ``scales`` and ``zeros`` [outputs, blocks] as they lie."""
    size = q.shape[-1]
    whole: Array = q.astype(np.uint8)
    flat: Array = zeros.astype(np.uint8)
    stored: Array | None = None
    if bits == 4:
        whole = whole[..., ::2] | whole[..., 1::2] << 4
        if flat.shape[1] % 2:
            flat = np.pad(flat, ((0, 0), (0, 1)))
        stored = flat[:, ::2] | flat[:, 1::2] << 4
    return Blocks(bits, size, inputs, whole, scales.astype(np.float16), stored)


def quantize(weights: Array, bits: int, size: int, importance: Array | None = None) -> Blocks:
    """Round a matrix, float32 [outputs, inputs], to the grids of its blocks of ``size`` inputs.
    ``importance`` [inputs].
    """
    inputs = weights.shape[1]
    values = split(weights, size)
    weight = np.ones((1, inputs), np.float32) if importance is None else importance[None]
    weight = split(weight.astype(np.float32), size)
    scales, zeros = grid(values, weight, bits)
    q = rounded(values, scales, zeros, bits)
    return pack(q, scales[..., 0], zeros[..., 0], bits, inputs)


def restored(blocks: Blocks) -> Array:
    """The float32 values that blocks stand for, [outputs, inputs]."""
    q = blocks.packed
    zeros = np.full(blocks.scales.shape, 128, np.uint8)
    if blocks.bits == 4:
        q = np.stack([q & 15, q >> 4], axis=-1).reshape(*q.shape[:-1], -1)
        assert blocks.zeros is not None
        zeros = np.stack([blocks.zeros & 15, blocks.zeros >> 4], axis=-1)
        zeros = zeros.reshape(len(zeros), -1)[:, : q.shape[1]]
    steps = q.astype(np.float32) - zeros[..., None].astype(np.float32)
    values = steps * blocks.scales.astype(np.float32)[..., None]
    found: Array = values.reshape(len(q), -1)[:, : blocks.inputs]
    return found
