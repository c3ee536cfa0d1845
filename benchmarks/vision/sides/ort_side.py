"""Plain ONNX Runtime's side of ``peers.py``: its own quantizer, as its documentation says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loop
import onnxruntime
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static


class _Reader:
    def __init__(self, samples: list[loop.Feed]) -> None:
        self._samples: Iterator[loop.Feed] = iter(samples)

    def get_next(self) -> loop.Feed | None:
        return next(self._samples, None)


def write(given: dict[str, Any], path: Path) -> None:
    """Quantize the model to a file."""
    if not given["convolutions"]:
        quantize_dynamic(given["model"], path, weight_type=QuantType.QInt8)
        return
    quantize_static(
        given["model"],
        path,
        _Reader(loop.feeds(given["calibration"])),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )


def main() -> None:
    given = loop.arguments()
    model = given["model"]
    if given["int8"]:
        made = loop.once(Path(f"{given['out']}.onnx"), lambda path: write(given, path))
        model = str(made)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = given["threads"]
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(feed: loop.Feed) -> Any:
        return session.run(None, feed)[0]

    loop.serve(run, given, Path(model).stat().st_size)


if __name__ == "__main__":
    main()
