"""Quantizes a TFLite file: which scheme, which operators, and what is better left in float.

Decides and compares; ai-edge-quantizer writes the files. Never knows where a model comes from.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import _proc
from edgekit.errors import EngineCrashedError, ExportError, MissingExtraError, RecipeError
from edgekit.exporter import Progress
from edgekit.exporters import tflite_grid, tflite_mixture, tflite_ranges
from edgekit.exporters.silence import silenced
from edgekit.exporters.tflite_ranges import Range, Values
from edgekit.exporters.torch_to_tflite import Engine
from edgekit.formats import tflite

Feeds = Sequence[Mapping[str, Any]]
STATIC = "static_wi8_ai8"
_GRIDS = ("weight_only_wi4_afp32", "dynamic_wi4_afp32")  # steps of the weights are known
_FLOAT = "F32"
_BLOCK = "BLOCKWISE_32"
_TRIALS = 16  # samples that variants are compared on
_OPEN, _OPEN_TIMEOUT_S = "edgekit.exporters.torch_to_tflite:open_file", 600
# How the range of an activation is found.
_RANGES: dict[str, Callable[[Values], Range]] = {
    "MinMax": tflite_ranges.whole,
    "Percentile": tflite_ranges.most,
    "MSE": tflite_ranges.least_error,
}


def quantize(
    source: Path,
    out: Path,
    scheme: str,
    *,
    samples: Feeds = (),
    overrides: Sequence[tuple[str, str]] = (),
    progress: Progress,
) -> dict[str, Any]:
    """Write the float file ``source`` to ``out`` in ``scheme``, a name of ``quant.TFLITE_TYPES``;
    facts for the manifest.

    ``samples`` are inputs by name, which static schemes need. ``overrides`` are pairs of a regular
    expression on names of operators' outputs and "F32", which keeps those in float.
    Raises RecipeError, ExportError, MissingExtraError.
    """
    header = tflite.read(source)
    kept = _kept(header, overrides)
    progress("quantize", 0, 1)
    facts: dict[str, Any] = {}
    if scheme == STATIC:
        made, facts = _static(source, header, kept, samples, progress)
    elif scheme in _GRIDS:
        made, facts = tflite_grid.write(source, kept, lambda names: write(source, scheme, names))
    else:
        made = write(source, scheme, kept)
    out.write_bytes(made)
    progress("quantize", 1, 1)
    floats = kept | set(facts.get("kept_float", ()))
    return facts | {"kept_float": sorted(map(_short, floats))}


def _short(name: str) -> str:
    """The converter joins the paths of all modules that it fused: the last says where one is."""
    path, _, number = name.rstrip(";").rpartition(";")
    whole = path or number
    return "/".join(whole.rpartition(";")[2].split("/")[-2:])[-100:]


def _static(
    source: Path, header: tflite.TfliteHeader, kept: set[str], samples: Feeds, progress: Progress
) -> tuple[bytes, dict[str, Any]]:
    """Ranges by the method that loses least on the samples, then floats where they save most."""
    if not samples:
        raise ExportError("static quantization needs samples")
    total = len(_RANGES) + sum(1 for _ in tflite_mixture.groups(header))
    done = 0

    def on_trial() -> None:
        nonlocal done
        done = min(total, done + 1)
        progress("calibrate", done, total)

    progress("calibrate", 0, total)
    values = tflite_ranges.measure(source, samples)
    trials = samples[:_TRIALS]
    wanted = answers(source.read_bytes(), trials)

    def loss(method: str, floats: Set[str]) -> float:
        made = write(source, STATIC, floats, values, _RANGES[method])
        return _loss(wanted, answers(made, trials))

    first = source.with_name("first-static.tflite")
    first.write_bytes(write(source, STATIC, kept, values, _RANGES[next(iter(_RANGES))]))
    try_in_child(first)
    losses = {}
    for method in _RANGES:
        losses[method] = loss(method, kept)
        on_trial()
    method = min(losses, key=lambda name: losses[name])
    mixture = tflite_mixture.search(header, kept, lambda floats: loss(method, floats), on_trial)
    progress("calibrate", total, total)
    facts = {
        "calibrator": method,
        "calibration_loss": float(f"{mixture.loss:.6g}"),
        "calibration_loss_all_int8": float(f"{mixture.before:.6g}"),
        "kept_float": sorted(mixture.floats),
    }
    return write(source, STATIC, kept | mixture.floats, values, _RANGES[method]), facts


def try_in_child(file: Path) -> None:
    """Raises ExportError where the engine ends the process that opens ``file``, as LiteRT 2.3 does
    with static int8 of some text encoders (all-MiniLM-L6-v2 among them), instead of an error.
    """
    try:
        _proc.call(
            _OPEN, {"path": str(file)}, timeout_s=_OPEN_TIMEOUT_S, what="LiteRT, opening int8"
        )
    except EngineCrashedError as error:
        raise ExportError(
            f"LiteRT cannot run static int8 of this model: {error.message}",
            hint="--type dynamic_wi8_afp32",
        ) from error


def answers(model: bytes, feeds: Feeds) -> list[Any]:
    """All outputs of every sample, flat."""
    engine = Engine(model)
    return [
        np.concatenate([answer.astype(np.float64).ravel() for answer in engine.run(feed).values()])
        for feed in feeds
    ]


def _loss(wanted: list[Any], found: list[Any]) -> float:
    """Mean squared error as a share of the mean square."""
    error = sum(float(((a - b) ** 2).sum()) for a, b in zip(wanted, found, strict=True))
    return error / max(1e-30, sum(float((a**2).sum()) for a in wanted))


def _kept(header: tflite.TfliteHeader, overrides: Sequence[tuple[str, str]]) -> set[str]:
    """Names of the outputs of operators that an override keeps in float."""
    if not overrides:
        return set()
    for _, kind in overrides:
        if kind.upper() != _FLOAT:
            raise RecipeError(f"a TFLite override can only be {_FLOAT}, not {kind}")
    tensors = header.main.tensors
    names = [tensors[o.outputs[0]].name for o in header.main.operators if o.outputs]
    found = {name for pattern, _ in overrides for name in names if re.search(pattern, name)}
    if not found:
        raise RecipeError("no operator has an output of a name that an override matches")
    return found


def write(
    source: Path,
    scheme: str,
    floats: Iterable[str] = (),
    values: Mapping[str, Values] | None = None,
    choose: Callable[[Values], Range] = tflite_ranges.whole,
) -> bytes:
    """The file ``source`` in ``scheme``; operators whose first output is in ``floats`` stay as they
    are. Of static types ``choose`` makes the ranges of ``values``. Raises ExportError.
    """
    with _failing():
        library = _library()
        task = library.Quantizer(str(source))
        _ask(task, library, scheme)
        for name in sorted(floats):
            task.update_quantization_recipe(
                f"^{re.escape(name)};?$", "*", algorithm_key=library.AlgorithmName.NO_QUANTIZE
            )
        ranges = None
        if values is not None:
            ranks = {t.name: len(t.shape) for t in tflite.read(source).main.tensors}
            ranges = {name: _as_asked(choose(each), ranks[name]) for name, each in values.items()}
        made = task.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
        return bytes(made.quantized_model)


def _library() -> Any:
    try:
        from ai_edge_quantizer import quantizer
    except ImportError as error:
        missing = error.name or "ai-edge-quantizer"
        raise MissingExtraError("tflite-convert", missing=missing) from None
    return quantizer


def _as_asked(found: Range, rank: int) -> dict[str, Any]:
    """Bounds in the library's shape: one axis for each of the tensor's."""
    low, high = found
    return {
        "min": np.full((1,) * rank, low, np.float32),
        "max": np.full((1,) * rank, high, np.float32),
    }


def _ask(task: Any, library: Any, scheme: str) -> None:
    """Tell the library what ``scheme`` means. Inputs and outputs stay float."""
    match scheme:
        case "F16":
            for kind in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE"):
                task.add_weight_only_config(
                    ".*", kind, 16, algorithm_key=library.AlgorithmName.FLOAT_CASTING
                )
            task.add_weight_only_config(
                ".*", "EMBEDDING_LOOKUP", 16, algorithm_key=library.AlgorithmName.FLOAT_CASTING
            )
        case "dynamic_wi8_afp32":
            task.add_dynamic_config(".*", "*", 8)
        case "weight_only_wi8_afp32":
            task.add_weight_only_config(".*", "*", 8)
        case "weight_only_wi4b32":
            task.add_weight_only_config(".*", "*", 8)
            for kind in ("FULLY_CONNECTED", "EMBEDDING_LOOKUP"):
                task.add_dynamic_config(".*", kind, 4, library.qtyping.QuantGranularity(_BLOCK))
        case "weight_only_wi4_afp32":
            task.add_weight_only_config(".*", "FULLY_CONNECTED", 4)
        case "dynamic_wi4_afp32":
            task.add_dynamic_config(".*", "FULLY_CONNECTED", 4)
        case "static_wi8_ai8":
            task.add_static_config(".*", "*", 8, 8)
            for end in ("INPUT", "OUTPUT"):
                task.update_quantization_recipe(
                    ".*", end, algorithm_key=library.AlgorithmName.NO_QUANTIZE
                )


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        with silenced():
            yield
    except (ExportError, RecipeError, MissingExtraError):
        raise
    except Exception as error:  # the library's own kinds, which have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ExportError(
            f"ai-edge-quantizer cannot quantize this graph: {reason[:200]}"
        ) from error
