"""LiteRT's side of ``peers.py``: litert-torch, quantized by ai-edge-quantizer's own recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import litert_torch
import loop
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe


def rounded(array: Any, details: dict[str, Any]) -> Any:
    """As the input wants it: a static int8 file takes int8."""
    if details["dtype"] != np.int8:
        return array
    scale, zero = details["quantization"]
    return np.clip(np.rint(array / scale) + zero, -128, 127).astype(np.int8)


def floats(array: Any, details: dict[str, Any]) -> Any:
    """The other way."""
    if details["dtype"] != np.int8:
        return array
    scale, zero = details["quantization"]
    return (array.astype(np.float32) - zero) * scale


def main() -> None:
    given = loop.arguments()
    module, places = loop.module_of(given)
    path = f"{given['out']}.tflite"
    litert_torch.convert(module, places).export(path)
    names = [f"args_{number}" for number in range(len(places))]

    def by_place(feed: loop.Feed) -> loop.Feed:
        return dict(zip(names, feed.values(), strict=True))

    if given["int8"]:
        # Static for convolutions; models of matrix products are much slower with it.
        static = given["convolutions"]
        rules = recipe.static_wi8_ai8() if static else recipe.dynamic_wi8_afp32()
        work = quantizer.Quantizer(path, rules)
        ranges = None
        if static:
            samples = [by_place(feed) for feed in loop.feeds(given["calibration"])]
            ranges = work.calibrate({"serving_default": samples})
        path = f"{given['out']}.int8.tflite"
        work.quantize(ranges).export_model(path)
    runner = Interpreter(path, num_threads=given["threads"]).get_signature_runner()

    wanted = runner.get_input_details()
    (given_back,) = runner.get_output_details().values()

    def run(feed: loop.Feed) -> Any:
        places = {name: rounded(array, wanted[name]) for name, array in by_place(feed).items()}
        return floats(next(iter(runner(**places).values())), given_back)

    loop.serve(run, given, Path(path).stat().st_size)


if __name__ == "__main__":
    main()
