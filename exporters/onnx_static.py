"""Static int8 for convolutions: ranges, bits of weights and what helps beside, by the least loss.

Tries and compares, on samples that no correction saw; the methods are its neighbours', the form of
the file is onnxruntime.quantization's. Never knows where a model comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import ExportError
from edgekit.exporter import Progress
from edgekit.exporters import (
    onnx_bias,
    onnx_equalization,
    onnx_graph,
    onnx_ranges,
    ort_quantization,
)
from edgekit.exporters.onnx_graph import Graph
from edgekit.exporters.ort_quantization import failing

Feeds = Sequence[Mapping[str, Any]]
_TRIALS = 32  # samples that variants are compared on
_CORRECTED = 16  # others, that biases are corrected on
_MATRICES = ("MatMul", "Gemm")
# A kernel of the quantized graph that takes less than this part of all weights may stay float.
_SMALL = 0.02
# So much of the loss must go before a step beyond the plain ones is taken: less is chance.
_WORTH = 0.98
_STAGE = "calibrate"


@dataclass(frozen=True)
class Variant:
    """How ranges are found (``onnx_ranges.METHODS``); whether weights have 7 bits, for some kernels
    add products of 8 bits up in 16; which nodes stay float; what is done beside.
    """

    method: str
    reduced: bool = True
    floats: frozenset[str] = frozenset()
    equalized: bool = False
    corrected: bool = False

    @property
    def name(self) -> str:
        words = [self.method, f"{7 if self.reduced else 8} bits"]
        words += ["ends in float"] if self.floats else []
        words += ["equalized"] if self.equalized else []
        words += ["biases corrected"] if self.corrected else []
        return ", ".join(words)


def write(
    source: Path, folder: Path, kept: set[str], samples: Feeds, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """The quantized model and facts for the manifest. ``folder`` is for scratch files, ``kept`` are
    names of nodes that stay float.

    Raises ExportError without samples, and where the library cannot.
    """
    trials = search(source, folder, kept, samples, progress)
    best = trials.best
    return onnx_graph.load(trials.files[best]), {
        "calibrator": best.method,
        "weight_bits": 7 if best.reduced else 8,
        "kept_float": sorted(best.floats),
        "equalized": best.equalized,
        "biases_corrected": best.corrected,
        "calibration_loss": _short(trials.losses[best]),
        "tried": {each.name: _short(loss) for each, loss in trials.losses.items()},
    }


def search(
    source: Path, folder: Path, kept: set[str], samples: Feeds, progress: Progress
) -> Trials:
    """All that ``write`` tries, their files in ``folder``. Raises as it does."""
    if not samples:
        raise ExportError("static quantization needs samples")
    trials = Trials(ort_quantization.prepared(source, folder), folder, kept, samples, progress)
    for method in onnx_ranges.METHODS:
        trials.attempt(Variant(method))
    trials.attempt(replace(trials.best, reduced=False))
    if ends := trials.ends():
        trials.attempt(replace(trials.best, floats=frozenset(ends)))
    if trials.can_equalize:
        trials.attempt(replace(trials.best, equalized=True))
    if len(samples) > _TRIALS:
        trials.attempt(replace(trials.best, corrected=True))
    return trials


def _short(loss: float) -> float:
    return float(f"{loss:.6g}")


class Trials:
    """Variants of one graph, each written and judged once: ``losses`` and ``files`` of each."""

    def __init__(
        self, prepared: Path, folder: Path, kept: set[str], samples: Feeds, progress: Progress
    ) -> None:
        self._plain, self._folder, self._kept = prepared, folder, kept
        self._samples, self._progress = samples, progress
        self.losses: dict[Variant, float] = {}
        self.files: dict[Variant, Path] = {}
        self._wanted = ort_quantization.answers(prepared, samples[:_TRIALS])
        self._equal = folder / "equalized.onnx"
        model = onnx_graph.load(prepared)
        self.can_equalize = onnx_equalization.apply(model) > 0
        if self.can_equalize:
            onnx_graph.save(model, self._equal)
        self._seen: Callable[[Path], dict[str, onnx_ranges.Histogram]] = cache(
            lambda path: onnx_ranges.watch(path, samples)
        )
        self._steps = len(onnx_ranges.METHODS) + 2 + self.can_equalize + (len(samples) > _TRIALS)

    @property
    def best(self) -> Variant:
        """That of the least loss; one that does more must gain more than chance gives."""
        found, *others = self.losses
        for each in others:
            more = (each.equalized, each.corrected) > (found.equalized, found.corrected)
            if self.losses[each] < self.losses[found] * (_WORTH if more else 1):
                found = each
        return found

    def attempt(self, variant: Variant) -> None:
        """Write and judge it."""
        self._progress(_STAGE, len(self.losses), self._steps)
        out = self._folder / f"static-{len(self.losses)}.onnx"
        source = self._equal if variant.equalized else self._plain
        with failing(self._folder):
            if variant.corrected:
                before = self.files[replace(variant, corrected=False)]
                rest = self._samples[_TRIALS:][:_CORRECTED]
                onnx_bias.apply(source, before, rest, out, self._progress)
            else:
                self._write(source, out, variant)
        self.files[variant] = out
        found = ort_quantization.answers(out, self._samples[:_TRIALS])
        self.losses[variant] = ort_quantization.loss(self._wanted, found)
        self._progress(_STAGE, min(len(self.losses), self._steps), self._steps)

    def _write(self, source: Path, out: Path, variant: Variant) -> None:
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data

        method = onnx_ranges.METHODS[variant.method]
        ends = {name: method(seen) for name, seen in self._seen(source).items()}
        data = {name: tuple(map(np.float32, pair)) for name, pair in ends.items()}
        # What the library would have measured by itself lies there, for it to read.
        file = out.with_suffix(".json")
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, data), file)
        quantize_static(
            source,
            out,
            quant_format=QuantFormat.QDQ,
            # What x86's kernels take. ONNX Runtime's documentation puts signed ones with QDQ first
            # for every CPU, and finds them slow on x86 as QOperators; ARM was not measured here.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=variant.reduced,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=sorted(self._kept | variant.floats),
            extra_options=dict(ort_quantization.OPTIONS),
            calibration_cache_path=file,
        )

    def ends(self) -> set[str]:
        """The first and the last operator with weights, where they are small beside the rest: they
        see raw pixels and decide between classes.
        """
        graph = Graph(onnx_graph.load(self._plain))
        sizes: dict[str, int] = {}
        for node in graph.nodes:
            if node.op_type in ("Conv", *_MATRICES) and len(node.input) > 1:
                weights = graph.constant(node.input[1])
                if weights is not None:
                    sizes[node.name] = weights.size
        names = list(sizes)
        if len(names) < 3:
            return set()
        total = sum(sizes.values())
        return {name for name in (names[0], names[-1]) if sizes[name] < _SMALL * total}
