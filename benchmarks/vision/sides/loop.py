"""What every side of ``peers.py`` does: answer the samples, then run for so long as is asked.

Knows neither edgekit nor any engine. Inputs come as .npz files, one array for each input, stacked
along a first axis of samples. The one argument of a side is a JSON object with: "model", the float
ONNX file; "module", what ``module_of`` takes; "calibration" and "held_out", .npz files; "threads";
"int8", whether to quantize; "convolutions", whether the model is made of them; "out", where files
may go.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_WARM_UP = 5

Feed = dict[str, Any]


def arguments() -> dict[str, Any]:
    """The JSON object."""
    found: dict[str, Any] = json.loads(sys.argv[1])
    return found


def feeds(path: str) -> list[Feed]:
    """The samples of a file."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    count = len(next(iter(arrays.values())))
    return [{name: array[index] for name, array in arrays.items()} for index in range(count)]


def once(path: Path, write: Callable[[Path], None]) -> Path:
    """``path``, written by ``write`` (a file or a folder) unless an earlier run has."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        write(partial)
        partial.rename(path)
    return path


def module_of(given: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The torch module of ``models.py`` or of a BERT's folder, and example inputs by place."""
    import torch

    example = feeds(given["held_out"])[0]
    places = tuple(torch.from_numpy(array) for array in example.values())
    if Path(given["module"]).is_dir():
        return _encoder(given["module"], list(example)), places
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import models

    found = getattr(models, given["module"])()[0]
    return (_Logits(found) if hasattr(found, "config") else found).eval(), places


def _encoder(folder: str, names: list[str]) -> Any:
    import torch
    from transformers import AutoModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, attn_implementation="eager")

        def forward(self, *places: Any) -> Any:
            return self.model(**dict(zip(names, places, strict=True))).last_hidden_state

    return Encoder().eval()


def _Logits(model: Any) -> Any:
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Any) -> Any:
            return self.model(images).logits

    return Logits()


def serve(run: Callable[[Feed], Any], given: dict[str, Any], size_bytes: int) -> None:
    """``run`` answers one sample with its first output."""
    samples = feeds(given["held_out"])
    np.savez(given["out"], *[np.array(run(feed)) for feed in samples])
    for _ in range(_WARM_UP):
        run(samples[0])
    print(json.dumps({"ready": size_bytes}), flush=True)
    for line in sys.stdin:
        runs = []
        ends = time.perf_counter() + float(line)
        while (started := time.perf_counter()) < ends:
            run(samples[0])
            runs.append(time.perf_counter() - started)
        print(json.dumps(runs), flush=True)
