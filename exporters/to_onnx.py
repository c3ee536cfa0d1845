"""The ONNX exporter: a Hugging Face folder, a torch module or an ONNX file in; a fused, quantized
ONNX file with its preprocessing out.

Decides the order of the work and its scratch files; tracing, fusion and quantization are known by
its neighbours on this shelf. Never imports a runtime of edgekit.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit import quant, sample_inputs
from edgekit.errors import RecipeError
from edgekit.exporter import ExportOptions, ExportPlan, Product, Progress, TensorPlan
from edgekit.exporters import onnx_graph, onnx_quantizer, passes, torch_model, torch_to_onnx
from edgekit.exporters.to_onnx_lm import OnnxLanguageExporter, takes
from edgekit.formats import onnx, safetensors
from edgekit.preprocess import FILE as PREPROCESS_FILE
from edgekit.preprocess import Preprocessing
from edgekit.recipe import Calibration, Recipe
from edgekit.runtime import TensorSpec
from edgekit.source import ModelSource, TorchModule

MODEL_FILE = "model.onnx"
TOKENIZER_FILE = "tokenizer.json"
_FLOAT_FILE, _QUANTIZED_FILE = "float.onnx", "quantized.onnx"
_DEFAULT_BITS = 8
_SAMPLES = 64  # inputs that a model is calibrated on
_FLOAT_BYTES = 4
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "numpy")
# Bytes of a weight of a matrix or a kernel, its scales included.
_WEIGHT_BYTES = {
    "F32": 4.0,
    "F16": 2.0,
    "dynamic_wi8_afp32": 1.0,
    "static_wi8_ai8": 1.0,
    "weight_only_wi8_afp32": 1.0,
    "weight_only_wi8b32": 1.125,
    "weight_only_wi4b32": 0.625,
}


class OnnxExporter:
    """One export: ``recipe`` first, then ``plan``, then ``run`` (edgekit.exporter.Exporter)."""

    def __init__(self) -> None:
        self._data: Path | None = None
        self._traced: torch_model.TracedModel | None = None
        self._own: TorchModule | None = None
        self._language: OnnxLanguageExporter | None = None

    def recipe(self, source: ModelSource, options: ExportOptions) -> Recipe:
        """``--bits`` or ``--type`` to a precision; calibration data to its hash."""
        if takes(source):
            self._language = OnnxLanguageExporter()
            return self._language.recipe(source, options)
        if options.bits is not None and options.type is not None:
            raise RecipeError(
                "give --bits or --type, not both", hint="--bits stands for one default type"
            )
        if options.adapter is not None:
            raise RecipeError("an adapter can only be merged into a GGUF", hint="--format gguf")
        torch_model.check(source)
        source = self._with_module(source)
        if options.type is not None:
            kind = quant.onnx_type(options.type)
        else:
            bits = options.bits or _DEFAULT_BITS
            kind = quant.onnx_preset(bits, convolutional=_is_convolutional(source))
        return Recipe(
            format="onnx",
            type=kind,
            calibration=self._calibration(kind, options),
            overrides=options.overrides,
            fusion=options.fusion,
        )

    def _with_module(self, source: ModelSource) -> ModelSource:
        """A user's function is called once: another call might give other weights."""
        if source.kind not in ("python", "run"):
            return source
        self._own = self._own or torch_model.own_module(source)
        return replace(source, module=self._own)

    def _calibration(self, kind: str, options: ExportOptions) -> Calibration | None:
        choice = options.calibration
        if kind not in quant.TAKES_SAMPLES:
            if choice not in (None, "none") or options.chunks is not None:
                raise RecipeError(f"{kind} looks at no inputs: a calibration has no use")
            return None
        if choice == "none":
            return None
        self._data = None if choice in (None, "builtin") else Path(str(choice))
        name, digest = sample_inputs.identity(self._data)
        return Calibration(name, digest, options.chunks or _SAMPLES, chunk_tokens=0)

    def plan(self, source: ModelSource, recipe: Recipe) -> ExportPlan:
        """Sizes from headers and shapes; matrices are counted as quantized, whatever stays float
        in the end.
        """
        if self._language:
            return self._language.plan(source, recipe)
        tensors = tuple(_planned(self._with_module(source), recipe))
        size_bytes = sum(tensor.size_bytes for tensor in tensors)
        elements = sum(math.prod(tensor.shape) for tensor in tensors)
        return ExportPlan(
            recipe=recipe,
            size_bytes=size_bytes,
            scratch_bytes=2 * _FLOAT_BYTES * elements,
            bits_per_weight=size_bytes * 8 / max(1, elements),
            tensors=tensors,
            reference_bytes=_FLOAT_BYTES * elements,
        )

    def run(
        self,
        source: ModelSource,
        hashes: dict[str, str],
        plan: ExportPlan,
        folder: Path,
        progress: Progress,
    ) -> Product:
        """Trace, fuse and quantize into ``folder``."""
        if self._language:
            return self._language.run(source, hashes, plan, folder, progress)
        recipe = plan.recipe
        model = folder / MODEL_FILE
        with tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as name:
            scratch = Path(name)
            plain, preprocessing, off = self._plain(source, scratch / _FLOAT_FILE, progress)
            quantized = scratch / _QUANTIZED_FILE
            details = self._quantize(plain, quantized, source, recipe, preprocessing, progress)
            # Last, for the library that quantizes does not know the fused operators.
            fired = _fuse(quantized, model, recipe, progress)
        files = [("model", MODEL_FILE)]
        files += [("weights", path.name) for path in sorted(folder.glob(f"{MODEL_FILE}.*"))]
        files += _companions(source, preprocessing, folder)
        header = onnx.read(model)
        details |= {
            "task": preprocessing.task,
            "opset": header.opsets.get("", 0),
            "passes": fired,
            "inputs": [_spec(value) for value in header.inputs],
            "outputs": [_spec(value) for value in header.outputs],
            "parameters": sum(math.prod(tensor.shape) for tensor in header.initializers),
            "traced_error": off,
        }
        return Product(tuple(files), details, _PACKAGES)

    def reference(
        self, source: ModelSource, recipe: Recipe, path: Path, progress: Progress
    ) -> Path:
        """The graph as it was traced: float32, neither fused nor quantized."""
        if self._language:
            return self._language.reference(source, recipe, path, progress)
        if source.kind == "onnx":
            return source.path
        return self._plain(source, path, progress)[0]

    def _plain(
        self, source: ModelSource, path: Path, progress: Progress
    ) -> tuple[Path, Preprocessing, float | None]:
        """The float graph, what its inputs are made by, and how far it is off from torch."""
        if source.kind == "onnx":
            return source.path, Preprocessing(task="tensors"), None
        if self._traced is None:
            progress("load the model", 0, 1)
            self._traced = torch_model.build(self._with_module(source))
            progress("load the model", 1, 1)
        progress("trace", 0, 2)
        torch_to_onnx.write(self._traced, path)
        progress("trace", 1, 2)
        off = torch_to_onnx.check(self._traced, path)
        progress("trace", 2, 2)
        return path, self._traced.preprocessing, off

    def _quantize(
        self,
        plain: Path,
        out: Path,
        source: ModelSource,
        recipe: Recipe,
        preprocessing: Preprocessing,
        progress: Progress,
    ) -> dict[str, Any]:
        if recipe.type == "F32":
            onnx_graph.save(onnx_graph.load(plain), out)
            return {}
        feeds: list[Any] = []
        if recipe.calibration is not None:
            header = onnx.read(plain)
            specs = [TensorSpec(v.name, v.dtype, v.shape) for v in header.inputs]
            found = sample_inputs.samples(
                preprocessing,
                specs,
                folder=source.path if source.kind == "hf" else None,
                data=self._data,
                count=recipe.calibration.chunks,
                part="calibration",
            )
            feeds = found.feeds
        return onnx_quantizer.quantize(
            plain, out, recipe.type, samples=feeds, overrides=recipe.overrides, progress=progress
        )


def _fuse(path: Path, out: Path, recipe: Recipe, progress: Progress) -> dict[str, int]:
    """Which passes fired how often; none where the recipe says so."""
    progress("fuse", 0, 1)
    model = onnx_graph.load(path)
    fired = passes.run(model) if recipe.fusion == "auto" else {}
    onnx_graph.save(model, out)
    progress("fuse", 1, 1)
    return fired


def _companions(
    source: ModelSource, preprocessing: Preprocessing, folder: Path
) -> Iterator[tuple[str, str]]:
    """Write what the runtime needs beside the graph, and name it."""
    if preprocessing.task == "tensors":
        return
    (folder / PREPROCESS_FILE).write_bytes(preprocessing.to_bytes())
    yield "preprocess", PREPROCESS_FILE
    if preprocessing.text:
        shutil.copyfile(source.file_path(TOKENIZER_FILE), folder / TOKENIZER_FILE)
        yield "tokenizer", TOKENIZER_FILE


def _is_convolutional(source: ModelSource) -> bool:
    if source.kind != "onnx":
        return torch_model.is_convolutional(source)
    return onnx_graph.is_convolutional(source.path)


def _planned(source: ModelSource, recipe: Recipe) -> Iterator[TensorPlan]:
    for name, shape, kind in _weights(source):
        wanted = recipe.type if len(shape) > 1 else "F32"
        yield TensorPlan(
            name=name,
            shape=shape,
            source_type=kind,
            type=wanted,
            wanted=wanted,
            size_bytes=round(math.prod(shape) * _WEIGHT_BYTES[wanted]),
        )


def _weights(source: ModelSource) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and type of every weight, from headers alone where there are any."""
    if source.kind == "onnx":
        for tensor in onnx.read(source.path).initializers:
            yield tensor.name, tensor.shape, tensor.dtype
    elif source.kind == "hf":
        for file in source.files:
            if file.endswith(".safetensors"):
                for each in safetensors.read(source.file_path(file)).tensors.values():
                    yield each.name, each.shape, each.dtype
    else:
        for name, array in torch_model.own_module(source).module.state_dict().items():
            yield name, tuple(array.shape), str(array.dtype).removeprefix("torch.")


def _spec(value: onnx.OnnxValue) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}
