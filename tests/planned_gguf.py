"""A header that was told from a config.json, written as a real GGUF file of zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edgekit.formats.gguf import GgufHeader
from edgekit.model_shape import header_of

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 17,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def header(**changes: Any) -> GgufHeader:
    """The header of ``CONFIG`` with ``changes``."""
    return header_of(CONFIG | changes)


def write(planned: GgufHeader, path: Path) -> Path:
    """Only what the quantizer reads: no tokenizer."""
    writer = gguf.GGUFWriter(path, planned.architecture)
    for key, value in planned.metadata.items():
        if key != "general.architecture":
            (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    writer.add_float32(f"{planned.architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    for tensor in planned.tensors:
        kind: Any = np.float16 if tensor.type == "F16" else np.float32
        writer.add_tensor(tensor.name, np.zeros(tensor.shape[::-1], dtype=kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
