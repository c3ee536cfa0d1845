"""A float model to measure quantizers on: the same function, with every linear weight off its grid.

The weights of a file that was quantized lie on that type's grid, so the type loses nothing when it
is tried again. Random positive scales, folded into one matrix and out of the next, move the weights
and leave the function (SmoothQuant's identity, https://arxiv.org/abs/2211.10438, section 4). Knows
GGUF files and this identity; never what is measured on the result.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import _fs, _proc
from edgekit.errors import LoadError, ParityError, UnsupportedModelError, UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.exporters import hf_to_gguf, quantizer
from edgekit.formats import gguf
from edgekit.llama_library import libllama, recent_log
from edgekit.source import ModelSource

_SCALES = (0.70, 1.42)  # about a factor of 2 in all: no grid of 32 values survives it
_CHECKED_TOKENS = 128
_TYPE_F32 = 0
_FLASH_OFF = 0

Array = np.ndarray[Any, np.dtype[np.float32]]

_ALWAYS = {"attn_norm.weight", "attn_output.weight", "ffn_norm.weight", "ffn_down.weight"}
_APART = {f"{name}.weight" for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")}
_BIASES = {f"attn_{name}.bias" for name in "qkv"}
_HEAD_NORMS = {"attn_q_norm.weight", "attn_k_norm.weight"}
_AFTER_NORMS = {"post_attention_norm.weight", "post_ffw_norm.weight"}


@dataclass(frozen=True)
class _Family:
    """The parts that a block has, and those that it may have and that no scale disturbs.

    ``max_difference`` (nats) is how far rounding alone may move a logit: SmolLM2's move by 8e-5.
    """

    parts: frozenset[str]
    may: frozenset[str] = frozenset()
    max_difference: float = 1e-3


# Only gated feed-forward parts: the product of gate and up is linear in up. A plain GELU (gpt2,
# phi2) lets no scale through, and ffn_down would stay on its grid.
_FAMILIES = {
    "llama": _Family(frozenset(_ALWAYS | _APART)),
    "qwen2": _Family(frozenset(_ALWAYS | _APART), frozenset(_BIASES)),
    "qwen3": _Family(frozenset(_ALWAYS | _APART | _HEAD_NORMS)),
    # llama.cpp looks its GELU up in a table of 16-bit floats: a last bit more becomes 0.001.
    "gemma3": _Family(
        frozenset(_ALWAYS | _APART | _HEAD_NORMS | _AFTER_NORMS), max_difference=1e-2
    ),
    # Queries, keys and values in one matrix; gate and up in another, gate first.
    "phi3": _Family(frozenset(_ALWAYS | {"attn_qkv.weight", "ffn_up.weight"})),
}
_TOP = {
    "token_embd.weight",
    "output_norm.weight",
    "output.weight",
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
}


def write(source: ModelSource, out: Path, *, seed: int, progress: Progress = no_progress) -> float:
    """Write the F32 GGUF ``out``, which computes what ``source`` computes with other weights.

    Returns the largest absolute difference of a logit over 128 tokens, in nats. The embedding stays
    on its grid: nothing before it could take a scale. The same ``seed`` gives the same scales.
    Raises UsageError when ``out`` exists or does not end in .gguf, UnsupportedModelError for a
    family whose structure lets no scale through, ParityError when a logit moves by more than
    rounding can (0.001; gemma3 0.01), OutOfSpaceError before the work starts.
    """
    out = out.absolute()
    if out.suffix.lower() != ".gguf":
        raise UsageError(f"{out.name} must end in .gguf")
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} exists already", hint="choose another --out, or move it away")
    if source.kind == "gguf":
        _check(gguf.read(source.path))
    with _fs.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=out.parent) as folder:
            model = Path(folder) / "model.gguf"
            _write_floats(source, model, progress)
            limit = _check(gguf.read(model)).max_difference
            before = _logits(model, Path(folder) / "before.npy", progress, 0)
            _rescale(model, np.random.default_rng(seed), progress)
            after = _logits(model, Path(folder) / "after.npy", progress, 1)
            difference = float(np.abs(after - before).max())
            if not difference < limit:
                raise ParityError(
                    f"the rescaled model's logits moved by {difference:.1e},"
                    f" rounding moves them by less than {limit:g}"
                )
            _fs.publish(model, out)
    return difference


def _write_floats(source: ModelSource, out: Path, progress: Progress) -> None:
    """All of the model in float32."""
    if source.kind == "hf":
        with tempfile.TemporaryDirectory(prefix="edgekit-plan-") as folder:
            plan = Path(folder) / "plan.gguf"
            hf_to_gguf.header_only(source, plan, "F32")
            _check(gguf.read(plan))
            _fs.require_space(out, plan.stat().st_size)
        step = partial(progress, "convert to F32")
        hf_to_gguf.write(source, out, "F32", progress=lambda _, done, total: step(done, total))
        return
    _fs.require_space(out, source.size_bytes + 4 * gguf.read(source.path).parameters)
    quantizer.quantize(
        source.path,
        out,
        "F32",
        imatrix=None,
        overrides=(),
        on_tensor=partial(progress, "convert to F32"),
    )


def _check(header: gguf.GgufHeader) -> _Family:
    """The family of a file whose every tensor has its place in the identity.

    Raises UnsupportedModelError for any other tensor: it may read a channel that is to be scaled.
    """
    family = _FAMILIES.get(header.architecture)
    if family is None:
        raise UnsupportedModelError(
            f"a {header.architecture} model cannot be moved off its grid",
            hint=f"known: {', '.join(sorted(_FAMILIES))}; others have matrices that no scale"
            " can be folded into",
        )
    parts: dict[int, set[str]] = {block: set() for block in range(_number(header, "block_count"))}
    for tensor in header.tensors:
        head, _, rest = tensor.name.partition(".")
        block, _, part = rest.partition(".")
        if head == "blk" and block.isdigit() and int(block) in parts:
            parts[int(block)].add(part)
        elif tensor.name not in _TOP:
            raise UnsupportedModelError(f"nobody knows what the tensor '{tensor.name}' reads")
    for index, found in parts.items():
        # A Llama 3 file of old converters repeats its rope factors in every block.
        if odd := (found ^ family.parts) - family.may - {"rope_freqs.weight"}:
            raise UnsupportedModelError(
                f"block {index} is not that of a plain {header.architecture}: '{min(odd)}'"
            )
    return family


def _number(header: gguf.GgufHeader, key: str, default: int | None = None) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}", default)
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"{header.architecture}.{key} is {value!r}, not one number")
    return value


class _Weights:
    """Views of an F32 GGUF's tensors, which write through to the file."""

    def __init__(self, path: Path) -> None:
        self.header = gguf.read(path)
        self._data = np.memmap(path, dtype=np.uint8, mode="r+")

    def __contains__(self, name: str) -> bool:
        return any(tensor.name == name for tensor in self.header.tensors)

    def view(self, name: str) -> Array:
        """[rows, columns], or [channels] of a vector."""
        found = self.header.tensor(name)
        if found.type != "F32":
            raise UnsupportedModelError(f"the tensor '{name}' stayed {found.type}")
        part = self._data[found.offset : found.offset + found.size_bytes]
        return part.view(np.float32).reshape(found.shape[::-1])

    def flush(self) -> None:
        self._data.flush()


def _rescale(path: Path, random: np.random.Generator, progress: Progress) -> None:
    """Fold scales into an F32 GGUF, in place."""
    weights = _Weights(path)
    heads = _number(weights.header, "attention.head_count")
    kv_heads = _number(weights.header, "attention.head_count_kv", heads)
    blocks = _number(weights.header, "block_count")
    for block in range(blocks):
        _rescale_block(weights, f"blk.{block}.", heads, kv_heads, random)
        progress("move off the grid", block + 1, blocks)
    if "output.weight" in weights:
        _fold(weights.view("output_norm.weight"), [weights.view("output.weight")], random)
    weights.flush()


def _rescale_block(
    weights: _Weights, prefix: str, heads: int, kv_heads: int, random: np.random.Generator
) -> None:
    def view(part: str) -> Array:
        return weights.view(f"{prefix}{part}")

    fused = f"{prefix}attn_qkv.weight" in weights
    attention = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
    for norm, readers in (
        ("attn_norm", attention),
        ("ffn_norm", ["ffn_up"] if fused else ["ffn_gate", "ffn_up"]),
    ):
        _fold(view(f"{norm}.weight"), [view(f"{name}.weight") for name in readers], random)
    output = view("attn_output.weight")
    channels = output.shape[1] // heads * kv_heads
    scale = _draw(random, channels)
    for values in _value_rows(weights, prefix, channels):
        values *= scale.reshape(-1, *[1] * (values.ndim - 1))
    # All query heads of a group read the values of one key-value head.
    output /= np.repeat(scale.reshape(kv_heads, -1), heads // kv_heads, axis=0).reshape(-1)
    down = view("ffn_down.weight")
    scale = _draw(random, down.shape[1])
    view("ffn_up.weight")[-len(scale) :] *= scale[:, None]
    down /= scale


def _value_rows(weights: _Weights, prefix: str, channels: int) -> Iterator[Array]:
    """The rows that make values, and their biases; in a fused matrix they come last."""
    for name in ("attn_qkv.weight", "attn_v.weight", "attn_v.bias"):
        if prefix + name in weights:
            yield weights.view(prefix + name)[-channels:]


def _fold(gain: Array, readers: list[Array], random: np.random.Generator) -> None:
    """Scale the channels of a norm, and take the scale out of the matrices that read them."""
    scale = _draw(random, len(gain))
    gain *= scale
    for reader in readers:
        reader /= scale


def _draw(random: np.random.Generator, channels: int) -> Array:
    low, high = np.log(_SCALES)
    return np.exp(random.uniform(low, high, channels)).astype(np.float32)


def _logits(model: Path, out: Path, progress: Progress, turn: int) -> Array:
    """[tokens, vocabulary] over the calibration text, computed in a child process."""
    progress("compare logits", turn, 2)
    _proc.call(
        "edgekit.exporters.fair_reference:_write_logits",
        {"model": str(model), "out": str(out)},
        silence_s=quantizer.SILENCE_S,
        memory_bytes=quantizer.memory_limit(model),
        what="computing the reference's logits",
    )
    progress("compare logits", turn + 1, 2)
    values: Array = np.load(out, mmap_mode="r", allow_pickle=False)
    return values


def _write_logits(model: str, out: str) -> None:
    """Child side of ``_logits``: everything in float32, for rounding would hide a difference."""
    llama = libllama()
    wanted = llama.llama_model_default_params()
    wanted.n_gpu_layers = 0
    loaded = llama.llama_model_load_from_file(os.fsencode(model), wanted)
    if not loaded:
        raise LoadError(f"llama.cpp refused the model: {(recent_log() or ['no reason given'])[-1]}")
    text = resources.files("edgekit.exporters").joinpath("calibration.txt").read_bytes()
    vocabulary = llama.llama_model_get_vocab(loaded)
    room = min(len(text), 16 * _CHECKED_TOKENS)
    tokens = (llama.llama_token * room)()
    found = llama.llama_tokenize(vocabulary, text[:room], room, tokens, room, False, False)
    count = min(found, _CHECKED_TOKENS, llama.llama_model_n_ctx_train(loaded))
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = _CHECKED_TOKENS
    params.type_k = params.type_v = _TYPE_F32
    params.flash_attn_type = _FLASH_OFF
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama.llama_init_from_model(loaded, params)
    if count < 1 or not context:
        raise LoadError("llama.cpp could not make a context for the reference")
    batch = llama.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for position in range(count):
        batch.token[position] = tokens[position]
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = True
    if llama.llama_decode(context, batch):
        raise LoadError("llama.cpp could not evaluate the reference")
    width = llama.llama_vocab_n_tokens(vocabulary)
    logits = np.ctypeslib.as_array(llama.llama_get_logits(context), (count, width))
    if not np.isfinite(logits).all():
        raise ParityError("the model's logits are not finite")
    with _fs.disk_errors(Path(out)):
        np.save(out, logits)
