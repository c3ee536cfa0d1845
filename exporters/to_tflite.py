"""The TFLite exporter: a Hugging Face folder, a torch module or an ONNX file in; a quantized TFLite
file with its preprocessing out.

Decides the order of the work and its scratch files; tracing and quantization are known by its
neighbours on this shelf. Never imports a runtime of edgekit.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit import quant
from edgekit.errors import RecipeError, UnsupportedModelError
from edgekit.exporter import ExportOptions, ExportPlan, Product, Progress
from edgekit.exporters import tflite_quantizer, torch_model, torch_to_tflite
from edgekit.exporters.graph_source import GraphSource, companions, steps_of_onnx
from edgekit.formats import tflite
from edgekit.recipe import Recipe
from edgekit.registry import load
from edgekit.runtime import TensorSpec
from edgekit.source import ModelSource

MODEL_FILE = "model.tflite"
_FLOAT_FILE = "float.tflite"
_DEFAULT_BITS = 8
_PACKAGES = (
    *("torch", "transformers", "litert-torch", "litert-converter", "ai-edge-quantizer"),
    *("ai-edge-litert", "numpy"),
)
# Bytes of a weight of a matrix or a kernel, its scales included.
_WEIGHT_BYTES = {
    "F32": 4.0,
    "F16": 2.0,
    "dynamic_wi8_afp32": 1.0,
    "static_wi8_ai8": 1.0,
    "weight_only_wi8_afp32": 1.0,
    "weight_only_wi4b32": 0.5625,
    "weight_only_wi4_afp32": 0.5,
    "dynamic_wi4_afp32": 0.5,
}


class TfliteExporter:
    """One export: ``recipe`` first, then ``plan``, then ``run`` (edgekit.exporter.Exporter)."""

    def __init__(self) -> None:
        self._origin = GraphSource()

    def recipe(self, source: ModelSource, options: ExportOptions) -> Recipe:
        """``--bits`` or ``--type`` to a precision; calibration data to its hash."""
        quant.check_choice(options.bits, options.type)
        if options.adapter is not None:
            raise RecipeError("an adapter can only be merged into a GGUF", hint="--format gguf")
        if options.fusion != "auto":
            raise RecipeError("--no-fusion is for ONNX: LiteRT fuses when it loads a file")
        torch_model.check(source)
        if source.family in torch_model.BOTH:
            raise UnsupportedModelError(
                "a model of two encoders is exported to ONNX alone", hint="--format onnx"
            )
        if source.kind == "onnx":
            _onnx("onnx_to_torch:check")(source.path)
        source = self._origin.with_module(source)
        if options.type is not None:
            kind = quant.tflite_type(options.type)
        else:
            bits = options.bits or _DEFAULT_BITS
            convolutional = (
                _onnx("onnx_graph:is_convolutional")(source.path)
                if source.kind == "onnx"
                else torch_model.is_convolutional(source)
            )
            kind = quant.graph_preset("TFLite", bits, convolutional=convolutional)
        return Recipe(
            format="tflite",
            type=kind,
            calibration=self._origin.calibration(kind, options, quant.NEEDS_SAMPLES),
            overrides=options.overrides,
            fusion=options.fusion,
        )

    def plan(self, source: ModelSource, recipe: Recipe) -> ExportPlan:
        """Sizes from headers and shapes."""
        found = self._origin.plan(source, recipe, _WEIGHT_BYTES)
        if sizes := _pinned(source):
            told = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            warning = f"a TFLite file has one size: open axes are pinned to {told}"
            return replace(found, warnings=(*found.warnings, warning))
        return found

    def run(
        self,
        source: ModelSource,
        hashes: dict[str, str],
        plan: ExportPlan,
        folder: Path,
        progress: Progress,
    ) -> Product:
        """Trace and quantize into ``folder``."""
        recipe, model = plan.recipe, folder / MODEL_FILE
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as name:
            plain = Path(name) / _FLOAT_FILE
            traced, off = self._plain(source, plain, progress)
            details = self._quantize(plain, model, source, recipe, traced, progress)
        files = [("model", MODEL_FILE), *companions(source, traced.preprocessing, folder)]
        header = tflite.read(model)
        details |= {
            "task": traced.preprocessing.task,
            "inputs": _ends(header, "inputs"),
            "outputs": _ends(header, "outputs"),
            "parameters": header.parameters,
            "traced_error": off,
        }
        if sizes := _pinned(source):
            details["pinned"] = sizes
        return Product(tuple(files), details, _PACKAGES)

    def reference(
        self, source: ModelSource, recipe: Recipe, path: Path, progress: Progress
    ) -> Path:
        """The graph as it was traced: float32, not quantized; an ONNX file is that itself."""
        if source.kind == "onnx":
            return source.path
        self._plain(source, path, progress)
        return path

    def _plain(
        self, source: ModelSource, path: Path, progress: Progress
    ) -> tuple[torch_model.TracedModel, float]:
        """Write the float graph; the model it is of, and how far it is off from torch. What an ONNX
        file became in torch is held against that file first.
        """
        if source.kind == "onnx":
            traced = _module_of_onnx(source, progress)
        else:
            traced = self._origin.traced(source, progress)
        traced = torch_to_tflite.fixed(traced)
        progress("trace", 0, 2)
        torch_to_tflite.write(traced, path)
        progress("trace", 1, 2)
        off = torch_to_tflite.check(traced, path)
        progress("trace", 2, 2)
        return traced, off

    def _quantize(
        self,
        plain: Path,
        out: Path,
        source: ModelSource,
        recipe: Recipe,
        traced: torch_model.TracedModel,
        progress: Progress,
    ) -> dict[str, Any]:
        if recipe.type == "F32":
            shutil.copyfile(plain, out)
            return {}
        header = tflite.read(plain)
        tensors = header.main.tensors
        specs = [
            TensorSpec(name, tensors[number].dtype, tensors[number].shape)
            for name, number in header.inputs.items()
        ]
        feeds = self._origin.samples(source, recipe.calibration, traced.preprocessing, specs)
        return tflite_quantizer.quantize(
            plain, out, recipe.type, samples=feeds, overrides=recipe.overrides, progress=progress
        )


def _onnx(name: str) -> Any:
    """What knows ONNX, which only exports of such files need. Raises MissingExtraError."""
    return load(f"edgekit.exporters.{name}", extra="onnx")


def _pinned(source: ModelSource) -> dict[str, int]:
    """The open axes of an ONNX file, and the sizes that they get."""
    if source.kind != "onnx":
        return {}
    steps = steps_of_onnx(source)
    length = torch_to_tflite.length_of(steps)
    sizes: dict[str, int] = _onnx("onnx_to_torch:pinned")(source.path, steps, length)[1]
    return sizes


def _module_of_onnx(source: ModelSource, progress: Progress) -> torch_model.TracedModel:
    """Raises UnsupportedModelError, and ParityError where torch and ONNX Runtime differ."""
    steps = steps_of_onnx(source)
    progress("load the model", 0, 2)
    built = _onnx("onnx_to_torch:build")(source.path, steps, torch_to_tflite.length_of(steps))
    progress("load the model", 1, 2)
    _onnx("torch_to_onnx:check")(built, source.path)
    progress("load the model", 2, 2)
    made: torch_model.TracedModel = built
    return made


def _ends(header: tflite.TfliteHeader, which: str) -> list[dict[str, Any]]:
    ends: dict[str, int] = getattr(header, which)
    tensors = header.main.tensors
    return [
        {"name": name, "dtype": tensors[number].dtype, "shape": list(tensors[number].shape)}
        for name, number in ends.items()
    ]
