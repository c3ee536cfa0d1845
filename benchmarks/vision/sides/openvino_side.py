"""OpenVINO's side of ``peers.py``: float32, or int8 by NNCF's defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loop
import openvino


def quantized(model: Any, samples: list[loop.Feed], convolutions: bool) -> Any:
    """Static int8 with NNCF's defaults for the kind of model."""
    import nncf

    return nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=None if convolutions else nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
    )


def main() -> None:
    given = loop.arguments()
    core = openvino.Core()
    model = core.read_model(given["model"])
    weights = Path(given["model"])
    if given["int8"]:

        def write(folder: Path) -> None:
            folder.mkdir(exist_ok=True)
            made = quantized(model, loop.feeds(given["calibration"]), given["convolutions"])
            openvino.save_model(made, folder / "model.xml", compress_to_fp16=False)

        folder = loop.once(Path(f"{given['out']}-model"), write)
        weights = folder / "model.bin"
        model = core.read_model(folder / "model.xml")
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": given["threads"],
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # On some processors the default is bfloat16, which would be another model.
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()

    def run(feed: loop.Feed) -> Any:
        return request.infer(feed, share_inputs=True, share_outputs=True)[0]

    loop.serve(run, given, weights.stat().st_size)


if __name__ == "__main__":
    main()
