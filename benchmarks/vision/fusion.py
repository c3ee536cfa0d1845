"""What each pass of kernel fusion is worth here, in float32, dynamic and static int8.

A ViT in the shape of DeiT-tiny, a BERT in the shape of MiniLM on a text of 64 tokens and on one of
8, a ResNet-18 and a MobileNetV2, with random weights, for speed does not depend on them. Every row
adds a pass to the row above it; all of a model's run in turn, in one process, and ONNX Runtime
optimizes each as it loads. Below 1 the pass pays; the quartiles show what the neighbours did.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from transformers import (
    BertConfig,
    BertModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from edgekit.cli.ending import ending
from edgekit.exporter import no_progress
from edgekit.exporters import onnx_graph, onnx_quantizer, passes, torch_model, torch_to_onnx
from edgekit.source import source

TYPES = ("F32", "dynamic_wi8_afp32", "static_wi8_ai8")
_CONVOLUTIONAL = ("ResNet-18", "MobileNetV2")  # no type with ranges in every run suits them
_WARM_UP = 4
_DISABLED = ("SkipLayerNormFusion",)


def vit(folder: Path) -> dict[str, Any]:
    """Save the model; one image."""
    config = ViTConfig(
        hidden_size=192, intermediate_size=768, num_attention_heads=3, num_labels=1000
    )
    ViTForImageClassification(config).save_pretrained(folder)
    return image()


def resnet(folder: Path) -> dict[str, Any]:
    """Save the model, in the shape of ResNet-18; one image."""
    config = ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=1000
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    return image()


def mobilenet(folder: Path) -> dict[str, Any]:
    """Save the model; one image."""
    MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1001)).save_pretrained(folder)
    return image()


def image() -> dict[str, Any]:
    return {"pixel_values": np.random.default_rng(0).random((1, 3, 224, 224), np.float32)}


def bert(folder: Path, tokens: int = 64) -> dict[str, Any]:
    """Save the model; one text."""
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6)
    BertModel(config).save_pretrained(folder)
    ids = np.random.default_rng(0).integers(0, 30_000, (1, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}


MODELS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "DeiT-tiny": vit,
    "MiniLM": bert,
    "MiniLM, 8 tokens": partial(bert, tokens=8),
    "ResNet-18": resnet,
    "MobileNetV2": mobilenet,
}


def measure(name: str, kind: str, threads: int, reps: int) -> list[dict[str, Any]]:
    """A row for the graph as it is, and one for every pass that fires, each on top of those before:
    milliseconds (medians), and the ratio to the row before with its quartiles.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        feeds = MODELS[name](folder / "model")
        plain, start = folder / "plain.onnx", folder / "start.onnx"
        torch_to_onnx.write(torch_model.build(source(folder / "model")), plain)
        if kind == "F32":
            start = plain
        else:
            onnx_quantizer.quantize(plain, start, kind, samples=[feeds], progress=no_progress)
        model = onnx_graph.load(start)
        forms = [("as it is", 0, _session(model, threads, []))]
        # What runtimes/ort.py keeps the engine from, before any pass of edgekit's own.
        forms.append(("no SkipLayerNorm of the engine", 0, _session(model, threads)))
        for each in passes.PASSES:
            if count := passes.apply(each, model):
                forms.append((each, count, _session(model, threads)))
    seconds: list[list[float]] = [[] for _ in forms]
    for turn in range(-_WARM_UP, reps):
        order = range(len(forms)) if turn % 2 else reversed(range(len(forms)))
        for side in order:
            started = time.perf_counter()
            forms[side][2].run(None, feeds)
            if turn >= 0:
                seconds[side].append(time.perf_counter() - started)
    rows = []
    for number, (each, count, _) in enumerate(forms):
        pairs = zip(seconds[number], seconds[max(0, number - 1)], strict=True)
        low, middle, high = statistics.quantiles([mine / before for mine, before in pairs], n=4)
        rows.append(
            {
                "model": name,
                "type": kind,
                "threads": threads,
                "pass": each,
                "fired": count,
                "ms": 1e3 * statistics.median(seconds[number]),
                "ratio": middle,
                "quartiles": [low, high],
            }
        )
    return rows


def _session(model: Any, threads: int, disabled: Sequence[str] = _DISABLED) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # The threads of one graph must not spin while the other runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(disabled),
    )


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
    rows = []
    print("| model | type | threads | pass | fired | ms | ratio to the row above | quartiles |")
    print("|---|---|---|---|---|---|---|---|")
    for name, kind, threads in itertools.product(MODELS, TYPES, counts):
        if name in _CONVOLUTIONAL and kind.startswith("dynamic"):
            continue
        for row in measure(name, kind, threads, reps):
            low, high = row["quartiles"]
            print(
                f"| {name} | {kind} | {threads} | {row['pass']} | {row['fired']} | {row['ms']:.2f}"
                f" | {row['ratio']:.3f} | {low:.3f}..{high:.3f} |",
                flush=True,
            )
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    with ending():
        main()
