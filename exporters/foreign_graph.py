"""A stranger's ONNX file as a source: tried in a child process first, and whatever a library raises
over it afterwards is one error of ours.

Knows that a graph may crash, hang or confuse who reads it; never what an export makes of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from edgekit import _proc, sample_inputs
from edgekit.errors import EdgekitError, ExportError
from edgekit.exporters import ort_quantization
from edgekit.formats import onnx
from edgekit.preprocess import Preprocessing
from edgekit.runtime import TensorSpec
from edgekit.source import ModelSource

_TIMEOUT_S = 60
_SLOWEST_DISK_BYTES_S = 20_000_000  # half of what a slow SD card reads
# The file, a repacked copy of its weights, one more for what the header may hide; and the engine.
_COPIES = 3
_ENGINE_BYTES = 4 << 30
_HINT = "onnx.checker.check_model says whether the file is sound; export it again"


@contextlib.contextmanager
def fenced(source: ModelSource) -> Iterator[None]:
    """Around the work on a source of any kind; an ONNX file is tried before it.

    Raises EngineCrashedError or DeadlineError for one that kills or hangs the engine, ExportError
    for one that it refuses, and for whatever else a library says of it.
    """
    if source.kind != "onnx":
        yield
        return
    path = source.path
    size_bytes = sum((path.parent / name).stat().st_size for name in source.files)
    _proc.call(
        "edgekit.exporters.foreign_graph:attempt",
        {"path": str(path.absolute())},
        timeout_s=_TIMEOUT_S + size_bytes // _SLOWEST_DISK_BYTES_S,
        memory_bytes=_COPIES * size_bytes + _ENGINE_BYTES,
        what=f"trying {path.name} in a child process",
    )
    try:
        yield
    except (EdgekitError, OSError):  # a full disk among them
        raise
    except Exception as error:  # libraries ask of a graph what a stranger's need not have
        reason = " ".join(str(error).split()) or "no reason given"
        raise ExportError(
            f"the graph of {path.name} cannot be changed: {type(error).__name__}: {reason[:160]!a}",
            hint=_HINT,
        ) from error


def attempt(path: str) -> None:
    """In the child: load, and run once on small numbers. Raises ExportError if it does not load."""
    file = Path(path)
    specs = [TensorSpec(v.name, v.dtype, v.shape) for v in onnx.read(file).inputs]
    try:
        engine = ort_quantization.session(file)
    except Exception as error:  # the engine's own kinds, which have no common base
        reason = " ".join(str(error).split()).rpartition(" : ")[2].rpartition(" failed:")[2]
        raise ExportError(
            f"ONNX Runtime refuses {file.name}: {reason[:200]!a}", hint=_HINT
        ) from None
    # What it says of these numbers is the receipt's business: here it only has to survive them.
    with contextlib.suppress(Exception):
        found = sample_inputs.samples(
            Preprocessing("tensors"), specs, folder=None, data=None, count=1, part="calibration"
        )
        engine.run(None, dict(found.feeds[0]))
