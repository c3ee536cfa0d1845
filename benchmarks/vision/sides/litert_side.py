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
    """As the input wants it: a static int8 file takes int8, and no file takes int64."""
    if details["dtype"] != np.int8:
        return array.astype(details["dtype"])
    scale, zero = details["quantization"]
    return np.clip(np.rint(array / scale) + zero, -128, 127).astype(np.int8)


def floats(array: Any, details: dict[str, Any]) -> Any:
    """The other way."""
    if details["dtype"] != np.int8:
        return array
    scale, zero = details["quantization"]
    return (array.astype(np.float32) - zero) * scale


def by_place(feed: loop.Feed) -> loop.Feed:
    """Under the names that the converter gives."""
    return {f"args_{number}": array for number, array in enumerate(feed.values())}


def write(given: dict[str, Any], path: Path) -> None:
    """Convert the model to a file."""
    module, places = loop.module_of(given)
    plain = Path(f"{path}.float") if given["int8"] else path
    litert_torch.convert(module, places).export(str(plain))
    if not given["int8"]:
        return
    # Static for convolutions; models of matrix products are much slower with it.
    static = given["convolutions"]
    rules = recipe.static_wi8_ai8() if static else recipe.dynamic_wi8_afp32()
    work = quantizer.Quantizer(str(plain), rules)
    ranges = None
    if static:
        samples = [by_place(feed) for feed in loop.feeds(given["calibration"])]
        ranges = work.calibrate({"serving_default": samples})
    work.quantize(ranges).export_model(str(path))


def main() -> None:
    given = loop.arguments()
    path = loop.once(Path(f"{given['out']}.tflite"), lambda path: write(given, path))
    runner = Interpreter(str(path), num_threads=given["threads"]).get_signature_runner()

    wanted = runner.get_input_details()
    (given_back,) = runner.get_output_details().values()

    def run(feed: loop.Feed) -> Any:
        places = {name: rounded(array, wanted[name]) for name, array in by_place(feed).items()}
        return floats(next(iter(runner(**places).values())), given_back)

    loop.serve(run, given, path.stat().st_size)


if __name__ == "__main__":
    main()
