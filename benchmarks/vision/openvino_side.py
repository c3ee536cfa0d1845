"""OpenVINO's side of ``peers.py``; runs in an environment of its own and answers lines on stdin.

Knows neither edgekit nor what its figures are compared with. Inputs come as .npz files, one array
for each input, stacked along a first axis of samples.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import openvino

_WARM_UP = 5


def feeds(path: str) -> list[dict[str, Any]]:
    """The samples of a file."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    count = len(next(iter(arrays.values())))
    return [{name: array[index] for name, array in arrays.items()} for index in range(count)]


def quantized(model: Any, samples: list[dict[str, Any]], transformer: bool) -> Any:
    """Static int8 with NNCF's defaults for the kind of model."""
    import nncf

    return nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        preset=nncf.QuantizationPreset.MIXED,
    )


def main() -> None:
    """Arguments: the float model, calibration inputs, held-out inputs, threads, "f32" or "int8",
    "cnn" or "transformer", where the answers go.
    """
    model_path, calibration, held_out, threads, kind, family, out = sys.argv[1:]
    core = openvino.Core()
    model = core.read_model(model_path)
    if kind == "int8":
        model = quantized(model, feeds(calibration), family == "transformer")
        openvino.save_model(model, f"{out}.xml", compress_to_fp16=False)
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": int(threads),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # On some processors the default is bfloat16, which would be another model.
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    samples = feeds(held_out)
    answers = [next(iter(request.infer(feed).values())).copy() for feed in samples]
    np.savez(out, *answers)
    for _ in range(_WARM_UP):
        request.infer(samples[0])
    print("ready", flush=True)
    for line in sys.stdin:
        runs = []
        ends = time.perf_counter() + float(line)
        while (started := time.perf_counter()) < ends:
            request.infer(samples[0])
            runs.append(time.perf_counter() - started)
        print(json.dumps(runs), flush=True)


if __name__ == "__main__":
    main()
