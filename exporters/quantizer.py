"""llama.cpp's own quantizer, driven through its C interface in a child process.

Knows GGUF files, types and importance matrices as arrays; never Hugging Face folders or recipes.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import _fs, _proc
from edgekit.errors import ExportError, RecipeError, UnsupportedModelError
from edgekit.formats import gguf
from edgekit.llama_library import libllama, listen
from edgekit.quant import GGUF_FTYPES
from edgekit.registry import did_you_mean

# The quantizer tells what it does in its log alone; these are the two kinds of line that matter.
_TENSOR = re.compile(r"\[ *(\d+)/ *(\d+)\] +(\S+)")
_PLANNED = re.compile(r"\[ *\d+/ *\d+\] +(\S+) .*?type = *(\S+), .*?(?:\(([A-Za-z0-9_]+)\))?\s*$")
_FALLBACK = re.compile(r"warning: (\S+) +- ncols .*?required for type +(\w+)\) .*-> falling back")


# No tensor and no chunk of text takes this long, even on the slowest board.
SILENCE_S = 1800
# The mapped file, a float copy of its largest tensors, and the engine itself.
_FILE_COPIES = 4
_ENGINE_BYTES = 4 << 30


def memory_limit(path: Path) -> int:
    """How much address space, in bytes, a child may take that works on this GGUF file."""
    return _FILE_COPIES * path.stat().st_size + _ENGINE_BYTES


@dataclass(frozen=True)
class TensorType:
    """What the quantizer makes of a tensor: the type it has, gets, and would have got."""

    name: str
    source_type: str
    type: str
    wanted: str


def plan(
    path: Path, type_name: str, *, imatrix: bool, overrides: tuple[tuple[str, str], ...]
) -> list[TensorType]:
    """The type of every tensor if ``path`` were quantized to ``type_name``; reads no weight."""
    for tensor in gguf.read(path).tensors:
        if " " in tensor.name:  # the engine's log, which the plan is read from, has no quotes
            raise UnsupportedModelError(f"the tensor name '{tensor.name}' holds a blank")
    rows = _proc.call(
        "edgekit.exporters.quantizer:_plan",
        {"path": str(path), "type_name": type_name, "imatrix": imatrix, "overrides": overrides},
        timeout_s=120,
        memory_bytes=memory_limit(path),
        what=f"planning {type_name}",
    )
    return [TensorType(*row) for row in rows]


def quantize(
    path: Path,
    out: Path,
    type_name: str,
    *,
    imatrix: Path | None,
    overrides: tuple[tuple[str, str], ...],
    on_tensor: Callable[[int, int], None],
) -> None:
    """Write ``path`` quantized to ``type_name`` at ``out``; ``on_tensor`` hears (done, total).

    ``imatrix`` is a file of edgekit.exporters.imatrix. Raises ExportError with the engine's reason,
    OutOfSpaceError when the disk fills up.
    """
    _proc.call(
        "edgekit.exporters.quantizer:_quantize",
        {
            "path": str(path),
            "out": str(out),
            "type_name": type_name,
            "imatrix": imatrix and str(imatrix),
            "overrides": overrides,
        },
        silence_s=SILENCE_S,
        memory_bytes=memory_limit(path),
        what=f"quantizing to {type_name}",
        on_report=lambda message: on_tensor(*message),
    )


def tensor_type_id(name: str) -> int:
    """ggml's number for a tensor type's name. Raises RecipeError with the closest known name."""
    numbers = {kind.name: number for number, kind in gguf.TYPES.items()}
    if name.upper() not in numbers:
        raise RecipeError(
            f"unknown tensor type '{name}'", hint=did_you_mean(name.upper(), list(numbers))
        )
    return numbers[name.upper()]


def resolve_overrides(
    names: list[str], overrides: tuple[tuple[str, str], ...]
) -> list[tuple[str, int]]:
    """(tensor name, ggml type) for every tensor that a pattern matches; the first match wins.

    Raises RecipeError for a pattern that matches nothing: a typing error must not pass silently.
    """
    chosen: dict[str, int] = {}
    for pattern, kind in overrides:
        matching = [name for name in names if re.search(pattern, name)]
        if not matching:
            raise RecipeError(
                f"tensor pattern {pattern!r} matches no tensor",
                hint="edgekit export --dry-run lists the tensors",
            )
        for name in matching:
            chosen.setdefault(name, tensor_type_id(kind))
    return list(chosen.items())


def _params(path: Path, type_name: str, overrides: list[list[str]]) -> tuple[Any, list[Any]]:
    """Parameters of llama_model_quantize, and what must stay alive while it runs."""
    llama = libllama()
    params = llama.llama_model_quantize_default_params()
    params.ftype = GGUF_FTYPES[type_name]
    params.nthread = len(os.sched_getaffinity(0))
    params.allow_requantize = True  # the exporter has told the user already
    names = [tensor.name for tensor in gguf.read(path).tensors]
    pairs = resolve_overrides(names, tuple((pattern, kind) for pattern, kind in overrides))
    rows = (llama.llama_model_tensor_override * (len(pairs) + 1))()
    for row, (name, kind) in zip(rows, pairs, strict=False):
        row.pattern = f"^{re.escape(name)}$".encode()
        row.type = kind
    if pairs:
        params.tt_overrides = ctypes.cast(rows, ctypes.POINTER(llama.llama_model_tensor_override))
    return params, [rows]


def _imatrix_rows(entries: dict[str, Any]) -> Any:
    """A null-terminated array of llama_model_imatrix_data over float32 numpy arrays."""
    llama = libllama()
    rows = (llama.llama_model_imatrix_data * (len(entries) + 1))()
    for row, (name, values) in zip(rows, entries.items(), strict=False):
        row.name = name.encode()
        row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        row.size = values.size
    return rows


def _plan(path: str, type_name: str, imatrix: bool, overrides: list[list[str]]) -> list[list[str]]:
    """Child side of ``plan``."""
    import numpy as np

    llama = libllama()
    params, _alive = _params(Path(path), type_name, overrides)
    params.dry_run = True
    # Only whether there is a matrix decides types, so one number stands for it.
    stand_in = _imatrix_rows({"none": np.ones(1, dtype=np.float32)})
    if imatrix:
        params.imatrix = stand_in
    lines: list[str] = []
    with listen(lines.append):
        status = llama.llama_model_quantize(path.encode(), b"", ctypes.byref(params))
    if status:
        raise ExportError(f"llama.cpp cannot quantize to {type_name}: {_reason(lines)}")
    wanted = {m[1]: m[2].upper() for m in map(_FALLBACK.search, lines) if m}
    rows = []
    for match in filter(None, map(_PLANNED.search, lines)):
        source_type = match[2].upper()
        kind = (match[3] or match[2]).upper()
        rows.append([match[1], source_type, kind, wanted.get(match[1], kind)])
    return rows


def _quantize(
    path: str, out: str, type_name: str, imatrix: str | None, overrides: list[list[str]]
) -> None:
    """Child side of ``quantize``."""
    from edgekit.exporters import imatrix as matrices

    llama = libllama()
    params, _alive = _params(Path(path), type_name, overrides)
    entries = matrices.read(Path(imatrix)) if imatrix else {}
    rows = _imatrix_rows(entries)
    if entries:
        params.imatrix = rows
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if match := _TENSOR.search(line):
            _proc.report([int(match[1]), int(match[2])])

    with _fs.disk_errors(Path(out)), listen(on_line):
        status = llama.llama_model_quantize(path.encode(), out.encode(), ctypes.byref(params))
    if status:
        _fs.require_space(
            Path(out), 1 << 20
        )  # the engine's stream says only "failed" on a full disk
        raise ExportError(f"llama.cpp could not quantize to {type_name}: {_reason(lines)}")


def _reason(lines: list[str]) -> str:
    for line in reversed(lines):
        if "failed to quantize:" in line:
            return line.partition("failed to quantize:")[2].strip()
    return lines[-1].strip() if lines else "no reason given"
