"""What kernel fusion is worth here: the same graph with the passes of edgekit and without.

A ViT in the shape of DeiT-tiny and a BERT in the shape of MiniLM with random weights, for speed
does not depend on them. Both graphs run in turn, in one process; ONNX Runtime optimizes either as
it loads. Below 1 the fused one is faster; the quartiles show what the neighbours did.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

from edgekit.exporters import onnx_graph, passes, torch_model, torch_to_onnx
from edgekit.source import source

_TOKENS = 64
_WARM_UP = 4


def vit(folder: Path) -> dict[str, Any]:
    """Save the model; one image."""
    config = ViTConfig(
        hidden_size=192, intermediate_size=768, num_attention_heads=3, num_labels=1000
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return {"pixel_values": np.random.default_rng(0).random((1, 3, 224, 224), np.float32)}


def bert(folder: Path) -> dict[str, Any]:
    """Save the model; one text of 64 tokens."""
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
    BertModel(config).save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, 30_000, (1, _TOKENS))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}


MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {"DeiT-tiny": vit, "MiniLM": bert}


def measure(name: str, threads: int, reps: int) -> dict[str, Any]:
    """Milliseconds of both graphs, medians, and the quartiles of their ratio."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        feeds = MODELS[name](folder / "model")
        plain, fused = folder / "plain.onnx", folder / "fused.onnx"
        torch_to_onnx.write(torch_model.build(source(folder / "model")), plain)
        model = onnx_graph.load(plain)
        fired = passes.run(model)
        onnx_graph.save(model, fused)
        sessions = [_session(path, threads) for path in (plain, fused)]
    seconds: list[list[float]] = [[], []]
    for turn in range(-_WARM_UP, reps):
        for side in (0, 1) if turn % 2 else (1, 0):
            started = time.perf_counter()
            sessions[side].run(None, feeds)
            if turn >= 0:
                seconds[side].append(time.perf_counter() - started)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    before, after = (1e3 * statistics.median(side) for side in seconds)
    return {
        "model": name,
        "threads": threads,
        "plain_ms": before,
        "fused_ms": after,
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
        "passes": fired,
    }


def _session(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The threads of one graph must not spin while the other runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reps", type=int, default=100, help="runs of each graph (default 100)")
    parser.add_argument("--quick", action="store_true", help="five runs: shows that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    arguments = parser.parse_args()
    counts = sorted({1, len(os.sched_getaffinity(0))})
    reps = 5 if arguments.quick else arguments.reps
    rows = [measure(name, threads, reps) for name in MODELS for threads in counts]
    print("| model | threads | plain, ms | fused, ms | fused / plain | quartiles | fired |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["quartiles"]
        fired = ", ".join(f"{count} {name}" for name, count in row["passes"].items() if count)
        print(
            f"| {row['model']} | {row['threads']} | {row['plain_ms']:.2f} | {row['fused_ms']:.2f}"
            f" | {row['ratio']:.3f} | {low:.3f}..{high:.3f} | {fired} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
