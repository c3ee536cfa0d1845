"""A fair float model to measure quantizers on: SmolLM2, moved off the grid that it was stored on.

The built-in file is Q4_1, so its weights lie on a Q4_1 grid and that type would lose nothing. A
random positive scale per channel, folded into one matrix and out of the next, leaves the function
as it is and takes every linear weight off the grid. (The embedding stays on its Q8_0 grid: nothing
before it could take a scale.) Never knows what is measured on the model.
"""

from __future__ import annotations

import shutil
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import measure
import numpy as np
import peers

from edgekit import _proc
from edgekit.errors import ParityError
from edgekit.formats import gguf

MAX_LOGIT_DIFFERENCE = 1e-3
_SCALES = (0.70, 1.42)
_CHECKED_TOKENS = 128


def make(tools: peers.Tools, scratch: Path, seed: int) -> Path:
    """The F32 GGUF of the reference, made once per seed and kept.

    Raises ParityError when its logits differ from the original's by 1e-3 or more.
    """
    path = scratch / f"{peers.MODEL}-reference-{seed}.gguf"
    if path.is_file():
        return path
    original = peers.quantized(tools, scratch, "F32")
    measure.say(f"making {path.name}")
    unfinished = path.with_suffix(".partial")
    shutil.copyfile(original, unfinished)
    _rescale(unfinished, np.random.default_rng(seed))
    difference = _proc.call(
        "reference:logit_difference",
        {"one": str(original), "other": str(unfinished)},
        timeout_s=600,
        what="comparing the reference with its original",
    )
    measure.say(f"largest difference of a logit: {difference:.1e}")
    if difference >= MAX_LOGIT_DIFFERENCE:
        raise ParityError(f"the rescaled model's logits moved by {difference:.1e}")
    unfinished.rename(path)
    return path


def _rescale(path: Path, random: np.random.Generator) -> None:
    """Fold scales into the F32 weights of a llama-family GGUF, in place."""
    header = gguf.read(path)
    data = np.memmap(path, dtype=np.uint8, mode="r+")

    def tensor(block: int, name: str) -> Any:
        """A view of [rows, columns], or of [channels] for a norm."""
        found = header.tensor(f"blk.{block}.{name}.weight")
        part = data[found.offset : found.offset + found.size_bytes]
        return part.view(np.float32).reshape(found.shape[::-1])

    heads = header.metadata["llama.attention.head_count"]
    kv_heads = header.metadata["llama.attention.head_count_kv"]
    for block in range(header.metadata["llama.block_count"]):
        view = partial(tensor, block)
        for norm, readers in (
            ("attn_norm", ("attn_q", "attn_k", "attn_v")),
            ("ffn_norm", ("ffn_gate", "ffn_up")),
        ):
            scale = _draw(random, len(view(norm)))
            view(norm)[:] *= scale
            for reader in readers:
                view(reader)[:] /= scale
        values = view("attn_v")
        scale = _draw(random, len(values))
        values[:] *= scale[:, None]
        # All query heads of a group read the values of one key-value head.
        groups = np.repeat(scale.reshape(kv_heads, -1), heads // kv_heads, axis=0)
        view("attn_output")[:] /= groups.reshape(-1)
        scale = _draw(random, len(view("ffn_up")))
        view("ffn_up")[:] *= scale[:, None]
        view("ffn_down")[:] /= scale
    data.flush()


def _draw(random: np.random.Generator, channels: int) -> Any:
    low, high = np.log(_SCALES)
    return np.exp(random.uniform(low, high, channels)).astype(np.float32)


def logit_difference(one: str, other: str) -> float:
    """Largest absolute difference of a logit of two models over 128 tokens (child side)."""
    text = resources.files("edgekit.exporters").joinpath("calibration.txt").read_text("utf-8")
    return float(np.abs(_logits(one, text) - _logits(other, text)).max())


def _logits(model: str, text: str) -> Any:
    """[tokens, vocabulary], computed with everything in float32."""
    from edgekit.runtime import LoadParams
    from edgekit.runtimes.llama_engine import Engine

    path = Path(model)
    params = LoadParams(n_ctx=256, kv_type="f32", flash_attention=False)
    threads = measure.cores()
    engine = Engine(path, gguf.read(path), params, threads=(threads, threads))
    try:
        tokens = engine.tokenize(text, special=False)[:_CHECKED_TOKENS]
        engine.decode(tokens, 0, outputs=len(tokens))
        return np.stack([engine.logits(row).copy() for row in range(len(tokens))])
    finally:
        engine.close()
