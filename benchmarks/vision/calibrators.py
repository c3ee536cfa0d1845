"""What each way to static int8 keeps: four kinds of ranges, weights of 8 bits, ends in float,
equalized layers, corrected biases.

    benchmarks/vision/calibrators.py FLOAT_ARTIFACT [--eval-data FOLDER] [--calibration FOLDER]

FLOAT_ARTIFACT is a convolutional model, exported with ``--bits 32``. The variants are those that
``edgekit export --bits 8`` tries, in its order, on the inputs that it calibrates on: its loss is
the squared error of the answers on 32 of them, as a share of their squares, and the variant that it
would keep is marked. The other columns are of held-out inputs, which decide nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import edgekit
from edgekit import preprocess, sample_inputs
from edgekit.artifact import Artifact
from edgekit.cli.ending import ending
from edgekit.exporter import no_progress
from edgekit.exporters import onnx_static, ort_quantization

_CALIBRATION, _HELD_OUT = 64, 128


def rows(reference: Path, calibration: Path | None, held_out: Path | None) -> list[dict[str, Any]]:
    """One for each variant."""
    model = Artifact.open(reference).model_path
    with edgekit.load(reference) as session:
        specs = session.inputs
    steps = preprocess.beside(model)

    def feeds(data: Path | None, count: int, part: Any) -> list[dict[str, Any]]:
        return sample_inputs.samples(
            steps, specs, folder=reference, data=data, count=count, part=part
        ).feeds

    judged = feeds(held_out, _HELD_OUT, "held-out")
    truth = ort_quantization.answers(model, judged)
    with tempfile.TemporaryDirectory() as folder, ort_quantization.quiet():
        samples = feeds(calibration, _CALIBRATION, "calibration")
        found = onnx_static.search(model, Path(folder), set(), samples, no_progress)
        return [
            {
                "variant": variant.name,
                "loss": loss,
                "kept": variant == found.best,
                "MB": found.files[variant].stat().st_size / 1e6,
                **_likeness(truth, ort_quantization.answers(found.files[variant], judged)),
            }
            for variant, loss in found.losses.items()
        ]


def _likeness(truth: list[Any], answers: list[Any]) -> dict[str, float]:
    pairs = list(zip(truth, answers, strict=True))
    cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs]
    return {
        "cosine": float(np.mean(cosines)),
        "same": float(np.mean([a.argmax() == b.argmax() for a, b in pairs])),
    }


def main() -> None:
    """Print the table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=Path, metavar="FLOAT_ARTIFACT")
    parser.add_argument("--calibration", type=Path, metavar="FOLDER")
    parser.add_argument("--eval-data", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = rows(options.reference, options.calibration, options.eval_data)
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        return
    print("| variant | calibration loss | cosine | same class | MB |")
    print("|---|---|---|---|---|")
    for row in found:
        name = f"**{row['variant']}**" if row["kept"] else row["variant"]
        print(
            f"| {name} | {row['loss']:.5f} | {row['cosine']:.4f} | {row['same']:.1%}"
            f" | {row['MB']:.2f} |"
        )


if __name__ == "__main__":
    with ending():
        main()
