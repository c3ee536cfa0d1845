"""Tiny sound GGUF files, each below 20 kB, written by the gguf package: where hostile ones start.

Knows the shapes of a one-layer llama; must never need a trained weight.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

WIDTH, HEADS = 32, 2
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_vocabulary(writer: gguf.GGUFWriter) -> int:
    """Adds a tokenizer of single letters and all bytes; returns how many tokens it has."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", *string.ascii_lowercase]
    letters = len(tokens) - 3 - len(BYTES)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (3 + len(BYTES)) + [-float(rank) for rank in range(letters)])
    writer.add_token_types([2, 3, 3] + [6] * len(BYTES) + [1] * letters)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    return len(tokens)


def byte_level_vocabulary(writer: gguf.GGUFWriter) -> int:
    """Adds a byte-level BPE tokenizer with a handful of merges; returns how many tokens it has."""
    tokens = [*string.ascii_lowercase, "Ġ", "Ċ", "th", "he", "the", "<|endoftext|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["t h", "h e", "th e"])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
    return len(tokens)


def _llama(
    path: Path, kind: gguf.GGMLQuantizationType, vocabulary: Callable[[gguf.GGUFWriter], int]
) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    tokens = vocabulary(writer)
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int) -> None:
        weights = rng.normal(0, 0.1, (rows, WIDTH)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    matrix("token_embd.weight", tokens)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        matrix(f"blk.0.{name}.weight", WIDTH)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(WIDTH, np.float32))
    return _finished(writer, path)


def _vocabulary_only(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "gpt2")
    byte_level_vocabulary(writer)
    return _finished(writer, path)


def _finished(writer: gguf.GGUFWriter, path: Path) -> bytes:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def seeds(folder: Path) -> dict[str, bytes]:
    """Name -> file: two llamas that engines load, and a bare vocabulary."""
    kinds = gguf.GGMLQuantizationType
    return {
        "llama-q4_0": _llama(folder / "q4_0.gguf", kinds.Q4_0, sentencepiece_vocabulary),
        "llama-f16": _llama(folder / "f16.gguf", kinds.F16, byte_level_vocabulary),
        "vocabulary": _vocabulary_only(folder / "vocabulary.gguf"),
    }
