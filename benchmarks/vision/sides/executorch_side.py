"""ExecuTorch's side of ``peers.py``: lowered to XNNPACK, in float32 or in its quantizer's int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loop
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings import portable_lib
from executorch.runtime import Runtime


def quantized(module: Any, places: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Static for convolutions; for others dynamic, of linear layers: as a rule for all operators
    it rounds the sums of indices, too.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic = not given["convolutions"]
    kind = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    rules = XNNPACKQuantizer()
    rules = rules.set_module_type(torch.nn.Linear, kind) if dynamic else rules.set_global(kind)
    prepared = prepare_pt2e(torch.export.export(module, places).module(), rules)
    for feed in loop.feeds(given["calibration"]):
        prepared(*(torch.from_numpy(array) for array in feed.values()))
    return convert_pt2e(prepared)


def write(given: dict[str, Any], path: Path) -> None:
    """Convert the model to a file."""
    module, places = loop.module_of(given)
    with torch.no_grad():
        if given["int8"]:
            module = quantized(module, places, given)
        program = to_edge_transform_and_lower(
            torch.export.export(module, places), partitioner=[XnnpackPartitioner()]
        ).to_executorch()
    path.write_bytes(program.buffer)


def main() -> None:
    given = loop.arguments()
    path = loop.once(Path(f"{given['out']}.pte"), lambda path: write(given, path))
    portable_lib._unsafe_reset_threadpool(given["threads"])
    method = Runtime.get().load_program(path).load_method("forward")

    def run(feed: loop.Feed) -> Any:
        return method.execute([torch.from_numpy(array) for array in feed.values()])[0].numpy()

    loop.serve(run, given, path.stat().st_size)


if __name__ == "__main__":
    main()
