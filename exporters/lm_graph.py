"""A decoder as an ONNX graph of onnxruntime's fused operators, with its KV cache in place.

Knows which operators compute what a Decoder says; never where weights come from, how they were
quantized, or what a text is.

Inputs: ``input_ids`` int64 [batch, sequence]; ``rows`` int64 [n], the places in the sequence that
get logits; ``seqlens_k`` int32 [batch], the length of past and sequence less one;
``total_sequence_length`` int32; ``past.N.key`` and ``past.N.value`` float32 [batch, kv heads, past,
head]. Outputs: ``logits`` float32 [batch, n, vocabulary], ``hidden`` float32 [batch, n, width]
(what the head reads), ``present.N.key`` and ``present.N.value``. Where past and present are one
buffer, the operator writes the new cells into it and nothing is copied. The operators:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgekit.exporters.arch.decoder import Decoder, Rotation
from edgekit.exporters.lm_weights import EMBEDDING, HEAD
from edgekit.exporters.onnx_writer import GraphWriter

_INT8_COMPUTE = 4  # accuracy_level of MatMulNBits: activations in 8 bits inside the kernel
_FLOAT = 1  # TensorProto.DataType

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Plain:
    """A matrix in floats, [outputs, inputs], float32 or float16; it is computed with in float32."""

    values: Array


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks of ``size`` inputs each, as MatMulNBits has it: w = scale (q - zero).

    ``packed`` uint8 [outputs, blocks, size x bits / 8], ``scales`` float16 or float32 [outputs,
    blocks], ``zeros`` uint8 [outputs, bytes] or None for the middle of the range.
    """

    bits: int
    size: int
    inputs: int
    packed: Array
    scales: Array
    zeros: Array | None


Matrices = Callable[[str], Plain | Blocks]


class Vectors(Protocol):
    """Norms and biases by the names of ``lm_weights.Weights``, float32."""

    def gain(self, name: str) -> Array: ...
    def shift(self, name: str) -> Array | None: ...
    def bias(self, name: str) -> Array | None: ...


def write(
    decoder: Decoder, vectors: Vectors, matrices: Matrices, path: Path, *, beside: bool = False
) -> None:
    """Write the whole model. ``matrices`` is asked once for each matrix, in the graph's order.

    A head that is tied is not asked for. ``beside``: large weights go to a file of their own.
    """
    with GraphWriter(path, beside=beside) as writer:
        _Builder(decoder, vectors, matrices, writer).whole()
        writer.finish()


def write_layer(
    decoder: Decoder, vectors: Vectors, matrices: Matrices, layer: int, path: Path
) -> None:
    """Write one layer: ``input`` float32 [1, sequence, width] in, ``after`` of that shape out.

    Its other outputs are what each matrix reads: "qkv", "output", "gate_up", "down". There is no
    past: a text begins at its first row.
    """
    with GraphWriter(path) as writer:
        _Builder(decoder, vectors, matrices, writer).alone(layer)
        writer.finish()


@dataclass
class _Stream:
    """The residual stream: a value, and one that is still to be added."""

    value: str
    pending: str = ""


class _Builder:
    def __init__(
        self, decoder: Decoder, vectors: Vectors, matrices: Matrices, writer: GraphWriter
    ) -> None:
        self._decoder, self._vectors, self._matrices = decoder, vectors, matrices
        self._writer = writer
        self._reads: dict[str, str] = {}
        self._made: set[str] = set()

    # Whole graphs

    def whole(self) -> None:
        decoder, writer = self._decoder, self._writer
        ids = writer.input("input_ids", np.int64, ("batch", "sequence"))
        rows = writer.input("rows", np.int64, ("rows",))
        self._lengths()
        cells = ("batch", decoder.kv_heads, "past", decoder.head_dim)
        caches = [
            tuple(writer.input(f"past.{i}.{kind}", np.float32, cells) for kind in ("key", "value"))
            for i in range(decoder.layers)
        ]
        stream = _Stream(self._embedded(ids))
        for layer, cache in enumerate(caches):
            stream = self._layer(layer, stream, cache)
        for name in ("value", "pending"):
            if value := getattr(stream, name):
                picked = writer.node("Gather", [value, rows], f"final.{name}", axis=1)
                setattr(stream, name, picked)
        self._normed("final", stream, out="hidden")
        self._head("hidden")
        writer.output("logits", np.float32, ("batch", "rows", decoder.vocab_size))
        writer.output("hidden", np.float32, ("batch", "rows", decoder.width))
        cells = ("batch", decoder.kv_heads, "total", decoder.head_dim)
        for i in range(decoder.layers):
            for kind in ("key", "value"):
                writer.output(f"present.{i}.{kind}", np.float32, cells)

    def alone(self, layer: int) -> None:
        decoder, writer = self._decoder, self._writer
        value = writer.input("input", np.float32, (1, "sequence", decoder.width))
        self._lengths()
        stream = self._layer(layer, _Stream(value), None)
        writer.node("Add", [stream.value, stream.pending], "after")
        writer.output("after", np.float32, (1, "sequence", decoder.width))
        for name, read in self._reads.items():
            part = name.partition(".")[2]
            writer.node("Identity", [read], part)
            writer.output(part, np.float32, (1, "sequence", "inputs"))

    def _lengths(self) -> None:
        self._writer.input("seqlens_k", np.int32, ("batch",))
        self._writer.input("total_sequence_length", np.int32, ())

    # Ends

    def _embedded(self, ids: str) -> str:
        writer, table = self._writer, self._matrices(EMBEDDING)
        if isinstance(table, Plain):
            stored = writer.constant("embedding", table.values)
            found = writer.node("Gather", [stored, ids], "embedded")
            found = self._widened(found, table.values)
        else:
            # The shape in which the product of the head reads the same bytes.
            scales = self._scales("embedding", table)
            column = writer.constant("column", np.array([-1], np.int64))
            scales = writer.node("Unsqueeze", [scales, column], "embedding.columns")
            blocks = writer.node(
                "GatherBlockQuantized",
                [writer.constant("embedding.blocks", table.packed), ids, scales],
                "embedded.blocks",
                own=True,
                bits=table.bits,
                block_size=table.size,
                gather_axis=0,
                quantize_axis=2,
            )
            shape = writer.constant("embedded.shape", np.array([0, 0, -1], np.int64))
            found = writer.node("Reshape", [blocks, shape], "embedded")
        if self._decoder.embedding_scale != 1:
            scale = writer.constant("embedding.scale", np.float32(self._decoder.embedding_scale))
            found = writer.node("Mul", [found, scale], "embedded.scaled")
        self._table = table
        return found

    def _head(self, hidden: str) -> None:
        decoder, writer = self._decoder, self._writer
        capped = "logits.uncapped" if decoder.logit_cap else "logits"
        if not decoder.tied:
            self._product(HEAD, hidden, capped)
        elif isinstance(self._table, Plain):
            turned = writer.node("Transpose", ["embedding"], "head.weight", perm=[1, 0])
            turned = self._widened(turned, self._table.values)
            writer.node("MatMul", [hidden, turned], capped)
        else:
            self._block_product("embedding", self._table, hidden, capped, None)
        if decoder.logit_cap:
            cap = writer.constant("logits.cap", np.float32(decoder.logit_cap))
            share = writer.node("Div", [capped, cap], "logits.share")
            writer.node("Mul", [writer.node("Tanh", [share], "logits.tanh"), cap], "logits")

    # One layer

    def _layer(self, layer: int, stream: _Stream, cache: tuple[str, ...] | None) -> _Stream:
        decoder, writer = self._decoder, self._writer
        normed, kept = self._normed(f"{layer}.norm", stream)
        attended = self._attention(layer, normed, cache)
        if decoder.parallel:
            fed = self._fed(layer, normed)
            both = writer.node("Add", [attended, fed], f"{layer}.both")
            return _Stream(kept, both)
        if decoder.after_norms:
            attended, _ = self._normed(f"{layer}.after_attention", _Stream(attended))
        normed, kept = self._normed(f"{layer}.mlp_norm", _Stream(kept, attended))
        fed = self._fed(layer, normed)
        if decoder.after_norms:
            fed, _ = self._normed(f"{layer}.after_mlp", _Stream(fed))
        return _Stream(kept, fed)

    def _attention(self, layer: int, normed: str, cache: tuple[str, ...] | None) -> str:
        decoder, writer = self._decoder, self._writer
        query = self._product(f"{layer}.qkv", normed, f"{layer}.qkv")
        cos, sin = self._turns(decoder.rotation_of(layer))
        read = self._normed_heads(layer, query) if decoder.head_norms else [query, "", ""]
        inputs = [*read, *(cache or ("", "")), "seqlens_k", "total_sequence_length", cos, sin]
        window = decoder.window(layer)
        kinds = ("key", "value")
        where = "present" if cache else "alone"
        attended = writer.node(
            "GroupQueryAttention",
            inputs,
            f"{layer}.attended",
            *(f"{where}.{layer}.{kind}" for kind in kinds),
            own=True,
            num_heads=decoder.heads,
            kv_num_heads=decoder.kv_heads,
            scale=decoder.attention_scale,
            do_rotary=1,
            rotary_interleaved=0,
            **({"local_window_size": window} if window else {}),
        )
        return self._product(f"{layer}.output", attended, f"{layer}.attention")

    def _normed_heads(self, layer: int, query: str) -> list[str]:
        """Queries, keys and values apart, with a norm on every head of the first two. The operator
        of attention has inputs for these norms, but not on CPUs.
        """
        decoder, writer = self._decoder, self._writer
        counts = (decoder.heads, decoder.kv_heads, decoder.kv_heads)
        sizes = writer.constant("qkv.sizes", np.array(counts, np.int64) * decoder.head_dim)
        parts = [f"{layer}.{kind}" for kind in ("query", "key", "value")]
        writer.node("Split", [query, sizes], *parts, axis=-1)
        apart = writer.constant("heads.apart", np.array([0, 0, -1, decoder.head_dim], np.int64))
        together = writer.constant("heads.together", np.array([0, 0, -1], np.int64))
        for at, part in enumerate(parts[:2]):
            gain = writer.constant(f"{part}_norm.gain", self._vectors.gain(f"{part}_norm"))
            heads = writer.node("Reshape", [part, apart], f"{part}.heads")
            normed = writer.node(
                "SimplifiedLayerNormalization",
                [heads, gain],
                f"{part}.normed",
                axis=-1,
                epsilon=decoder.epsilon,
            )
            parts[at] = writer.node("Reshape", [normed, together], f"{part}.turned")
        return parts

    def _turns(self, rotation: Rotation) -> list[str]:
        """Tables of cosines and sines, [positions, head / 2]. They are written as how they are
        made: the engine computes them once, when it loads the file.
        """
        decoder, writer = self._decoder, self._writer
        name = "local" if rotation is decoder.local_rotation else "rotary"
        angles = f"{name}.angles"
        if angles not in self._made:
            self._made.add(angles)
            frequencies = np.zeros((1, decoder.head_dim // 2), np.float32)
            frequencies[0, : rotation.turning] = rotation.frequencies
            bounds = [
                writer.constant(f"positions.{part}", np.float32(value))
                for part, value in (("first", 0), ("end", decoder.context_length), ("step", 1))
            ]
            places = writer.node("Range", bounds, f"{name}.positions")
            axis = writer.constant("positions.axis", np.array([1], np.int64))
            column = writer.node("Unsqueeze", [places, axis], f"{name}.column")
            stored = writer.constant(f"{name}.frequencies", frequencies)
            writer.node("Mul", [column, stored], angles)
            for kind in ("Cos", "Sin"):
                out = f"{name}.{kind.lower()}"
                if rotation.factor == 1:
                    writer.node(kind, [angles], out)
                else:
                    factor = writer.constant(f"{name}.factor", np.float32(rotation.factor))
                    writer.node("Mul", [writer.node(kind, [angles], f"{out}.plain"), factor], out)
        return [f"{name}.cos", f"{name}.sin"]

    def _fed(self, layer: int, normed: str) -> str:
        decoder, writer = self._decoder, self._writer
        inner = self._product(f"{layer}.gate_up", normed, f"{layer}.gate_up")
        if decoder.gated:
            gate, up = f"{layer}.gate", f"{layer}.up"
            writer.node("Split", [inner], gate, up, axis=-1, num_outputs=2)
            inner = writer.node("Mul", [self._active(gate), up], f"{layer}.inner")
        else:
            inner = self._active(inner)
        return self._product(f"{layer}.down", inner, f"{layer}.fed")

    def _active(self, value: str) -> str:
        if self._decoder.activation == "silu":
            return self._writer.node("QuickGelu", [value], f"{value}.active", own=True, alpha=1.0)
        return self._writer.node("FastGelu", [value], f"{value}.active", own=True)

    # Parts

    def _normed(self, name: str, stream: _Stream, out: str = "") -> tuple[str, str]:
        """The norm of a stream, and the stream itself with nothing pending."""
        writer, epsilon = self._writer, self._decoder.epsilon
        gain = writer.constant(f"{name}.gain", self._vectors.gain(name))
        shift = self._vectors.shift(name)
        extra = [] if shift is None else [writer.constant(f"{name}.shift", shift)]
        kind = "Simplified" if self._decoder.norm == "rms" else ""
        out = out or f"{name}.out"
        if not stream.pending:
            inputs = [stream.value, gain, *extra]
            return (
                writer.node(f"{kind}LayerNormalization", inputs, out, axis=-1, epsilon=epsilon),
                stream.value,
            )
        kept = f"{name}.stream"
        inputs = [stream.value, stream.pending, gain, *extra]
        name = f"Skip{kind}LayerNormalization"
        return writer.node(name, inputs, out, "", "", kept, own=True, epsilon=epsilon), kept

    def _product(self, name: str, value: str, out: str) -> str:
        """``value`` times a matrix, and its bias."""
        writer, matrix, bias = self._writer, self._matrices(name), self._vectors.bias(name)
        self._reads[name] = value
        if isinstance(matrix, Blocks):
            return self._block_product(name, matrix, value, out, bias)
        stored = writer.constant(f"{name}.weight", matrix.values.T)
        stored = self._widened(stored, matrix.values)
        if bias is None:
            return writer.node("MatMul", [value, stored], out)
        product = writer.node("MatMul", [value, stored], f"{out}.unbiased")
        return writer.node("Add", [product, writer.constant(f"{name}.bias", bias)], out)

    def _block_product(
        self, name: str, matrix: Blocks, value: str, out: str, bias: Array | None
    ) -> str:
        writer = self._writer
        inputs = [value, writer.constant(f"{name}.blocks", matrix.packed)]
        inputs.append(self._scales(name, matrix))
        if matrix.zeros is not None:
            inputs.append(writer.constant(f"{name}.zeros", matrix.zeros))
        if bias is not None:
            inputs += [""] * (5 - len(inputs)) + [writer.constant(f"{name}.bias", bias)]
        return writer.node(
            "MatMulNBits",
            inputs,
            out,
            own=True,
            K=matrix.inputs,
            N=len(matrix.packed),
            bits=matrix.bits,
            block_size=matrix.size,
            accuracy_level=_INT8_COMPUTE,
        )

    def _scales(self, name: str, matrix: Blocks) -> str:
        stored = self._writer.constant(f"{name}.scales", matrix.scales)
        return self._widened(stored, matrix.scales)

    def _widened(self, name: str, values: Array) -> str:
        """float16 as float32; of a constant, the engine does that when it loads the file."""
        if values.dtype != np.float16:
            return name
        wide = f"{name}.wide"
        if wide not in self._made:
            self._made.add(wide)
            self._writer.node("Cast", [name], wide, to=_FLOAT)
        return wide
