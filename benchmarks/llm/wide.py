"""The fair reference with rows of 768: the same function, in matrices that any GGUF type can hold.

SmolLM2's rows of 576 are no multiple of 256: most k-quants and i-quants fall back to larger types
there, and their table says little about the many models whose rows are multiples. Here the residual
stream has 192 channels more, which stay zero, and the attention three query heads and a key-value
head more, which nothing reads. Never knows what is measured on the model.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np
import peers
import reference
from safetensors.numpy import load_file, save_file

import edgekit
from edgekit import evaluate
from edgekit.errors import ParityError

MAX_KL = 1e-5
_WIDTH, _HEADS, _KV_HEADS = 768, 12, 4


def make(scratch: Path, seed: int) -> Path:
    """The F32 GGUF of the wide model, made once per seed and kept.

    Raises ParityError when its mean KL divergence from the fair reference is above 1e-5.
    """
    path = scratch / f"{peers.MODEL}-wide-{seed}.gguf"
    if path.is_file():
        return path
    narrow = reference.make(scratch, seed)
    measure.say(f"making {path.name}")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        model = Path(folder) / "model"
        edgekit.convert(narrow, model, dtype="f32")
        _widen(model)
        made = edgekit.export(model, out=Path(folder) / "out", type="F32", receipt=False).model_path
        found = evaluate.compare(made, narrow, evaluate.read_text(None), chunks=2).mean_kl.value
        measure.say(f"mean KL divergence from the reference: {found:.1e}")
        if found > MAX_KL:
            raise ParityError(f"the wide model is another one: its mean KL is {found:.1e}")
        shutil.move(made, path)
    return path


def _widen(folder: Path) -> None:
    """Give a llama's Hugging Face folder the wide shapes, in place."""
    config = json.loads((folder / "config.json").read_text())
    width = config["hidden_size"]
    # The mean square is over more channels now: the gain and the epsilon make up for it.
    share = width / _WIDTH
    config |= {
        "hidden_size": _WIDTH,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "rms_norm_eps": config["rms_norm_eps"] * share,
    }
    (folder / "config.json").write_text(json.dumps(config))
    queries, keys = _HEADS * config["head_dim"], _KV_HEADS * config["head_dim"]
    shapes = {
        "q_proj": (queries, _WIDTH),
        "k_proj": (keys, _WIDTH),
        "v_proj": (keys, _WIDTH),
        "o_proj": (_WIDTH, queries),
        "down_proj": (_WIDTH, config["intermediate_size"]),
        "gate_proj": (config["intermediate_size"], _WIDTH),
        "up_proj": (config["intermediate_size"], _WIDTH),
        "embed_tokens": (config["vocab_size"], _WIDTH),
    }
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if values.ndim == 1:
            tensors[name] = _padded(values * np.float32(math.sqrt(share)), (_WIDTH,))
        else:
            tensors[name] = _padded(values, shapes[name.split(".")[-2]])
    save_file(tensors, folder / "model.safetensors")


def _padded(values: Any, shape: tuple[int, ...]) -> Any:
    found = np.zeros(shape, np.float32)
    found[tuple(slice(size) for size in values.shape)] = values
    return found
