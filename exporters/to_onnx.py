"""The ONNX exporter: a Hugging Face folder, a torch module or an ONNX file in; a fused, quantized
ONNX file with its preprocessing out.

Decides the order of the work and its scratch files; tracing, fusion and quantization are known by
its neighbours on this shelf. Never imports a runtime of edgekit.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgekit import quant, sample_inputs
from edgekit.errors import RecipeError
from edgekit.exporter import ExportOptions, ExportPlan, Product, Progress
from edgekit.exporters import (
    foreign_graph,
    fusion,
    onnx_graph,
    onnx_quantizer,
    torch_model,
    torch_to_onnx,
    torch_towers,
    via_optimum,
)
from edgekit.exporters.graph_source import GraphSource, companions, steps_of_onnx
from edgekit.exporters.to_onnx_lm import OnnxLanguageExporter, takes
from edgekit.exporters.torch_model import TracedModel
from edgekit.formats import onnx
from edgekit.preprocess import FILE as PREPROCESS_FILE
from edgekit.preprocess import Preprocessing
from edgekit.recipe import Recipe
from edgekit.runtime import TensorSpec
from edgekit.source import ModelSource

MODEL_FILE = "model.onnx"
_QUANTIZED = "quantized-"
_DEFAULT_BITS = 8
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "numpy")
# Bytes of a weight of a matrix or a kernel, its scales included.
_WEIGHT_BYTES = {
    "F32": 4.0,
    "F16": 2.0,
    "dynamic_wi8_afp32": 1.0,
    "static_wi8_ai8": 1.0,
    "weight_only_wi8_afp32": 1.0,
    "weight_only_wi8b32": 1.125,
    "weight_only_wi8b64": 1.0625,
    "weight_only_wi4b32": 0.625,
    "weight_only_wi4b64": 0.5625,
    "weight_only_wi4_afp32": 0.5625,
}


class OnnxExporter:
    """One export: ``recipe`` first, then ``plan``, then ``run`` (edgekit.exporter.Exporter)."""

    def __init__(self) -> None:
        self._origin = GraphSource()
        self._traced: tuple[Preprocessing, dict[str, TracedModel]] | None = None
        self._language: OnnxLanguageExporter | None = None

    def recipe(self, source: ModelSource, options: ExportOptions) -> Recipe:
        """``--bits`` or ``--type`` to a precision; calibration data to its hash."""
        if options.via:
            via_optimum.check(source)
        if takes(source):
            self._language = OnnxLanguageExporter()
            return self._language.recipe(source, options)
        quant.check_choice(options.bits, options.type)
        if options.adapter is not None:
            raise RecipeError("an adapter can only be merged into a GGUF", hint="--format gguf")
        torch_model.check(source)
        source = self._origin.with_module(source)
        if options.type is not None:
            kind = quant.onnx_type(options.type)
        else:
            bits = options.bits or _DEFAULT_BITS
            kind = quant.graph_preset("ONNX", bits, convolutional=_is_convolutional(source))
        return Recipe(
            format="onnx",
            type=kind,
            calibration=self._origin.calibration(kind, options, quant.TAKES_SAMPLES),
            overrides=options.overrides,
            fusion=options.fusion,
            via=options.via,
        )

    def plan(self, source: ModelSource, recipe: Recipe) -> ExportPlan:
        """Sizes from headers and shapes."""
        if self._language:
            return self._language.plan(source, recipe)
        return self._origin.plan(source, recipe, _WEIGHT_BYTES)

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
        with (
            foreign_graph.fenced(source),
            tempfile.TemporaryDirectory(prefix="scratch-", dir=folder) as name,
        ):
            steps, graphs = self._plain(source, Path(name), progress, recipe.via)
            facts = [self._quantize(graph, source, recipe, progress) for graph in graphs]
            # Last, for the library that quantizes does not know the fused operators.
            models = [onnx_graph.load(graph.quantized) for graph in graphs]
            feeds = [self._feeds(graph, source, 1)[0] for graph in graphs]
            chosen = fusion.choose(models, feeds, recipe.fusion, progress)
            for graph, model in zip(graphs, models, strict=True):
                onnx_graph.save(model, folder / graph.name)
        files = [
            ("model" if each.name == MODEL_FILE else "text-model", each.name) for each in graphs
        ]
        files += [("weights", path.name) for path in sorted(folder.glob("*.onnx.*"))]
        files += companions(source, steps, folder)
        details = [
            found | _form(folder / graph.name) | {"passes": fired, "traced_error": graph.off}
            for graph, found, fired in zip(graphs, facts, chosen.fired, strict=True)
        ]
        more = {"text_model": details[1]} if len(details) > 1 else {}
        return Product(
            tuple(files),
            details[0] | more | {"task": steps.task},
            _PACKAGES,
            recipe=replace(recipe, fusion=chosen.recipe),
            fusion=chosen.trials,
        )

    def reference(
        self, source: ModelSource, recipe: Recipe, path: Path, progress: Progress
    ) -> Path:
        """The graph as it was traced: float32, neither fused nor quantized; of two encoders that of
        the images, with the other one beside it.
        """
        if self._language:
            return self._language.reference(source, recipe, path, progress)
        if source.kind == "onnx":
            return source.path
        folder = path.with_suffix("")
        folder.mkdir()
        steps, graphs = self._plain(source, folder, progress)
        if steps.matching:
            (folder / PREPROCESS_FILE).write_bytes(steps.to_bytes())
        return graphs[0].path

    def _plain(
        self, source: ModelSource, folder: Path, progress: Progress, via: str = ""
    ) -> tuple[Preprocessing, list[_Graph]]:
        """What makes the inputs, and the float graphs, written to ``folder``."""
        if source.kind == "onnx":
            steps = steps_of_onnx(source)
            return steps, [
                _Graph(MODEL_FILE, source.path, steps, folder / f"{_QUANTIZED}{MODEL_FILE}", None)
            ]
        if self._traced is None:
            progress("load the model", 0, 1)
            self._traced = _traced(self._origin.with_module(source))
            progress("load the model", 1, 1)
        steps, traced = self._traced
        graphs = []
        for number, (name, model) in enumerate(traced.items()):
            done, whole = 2 * number, 2 * len(traced)
            progress("trace", done, whole)
            path = folder / name
            if via:
                via_optimum.write(source, model, path, progress)
            else:
                torch_to_onnx.write(model, path)
            progress("trace", done + 1, whole)
            off = torch_to_onnx.check(model, path)
            progress("trace", done + 2, whole)
            out = folder / f"{_QUANTIZED}{name}"
            graphs.append(_Graph(name, path, model.preprocessing, out, off))
        return steps, graphs

    def _quantize(
        self, graph: _Graph, source: ModelSource, recipe: Recipe, progress: Progress
    ) -> dict[str, Any]:
        if recipe.type == "F32":
            onnx_graph.save(onnx_graph.load(graph.path), graph.quantized)
            return {}
        count = recipe.calibration.chunks if recipe.calibration else 0
        return onnx_quantizer.quantize(
            graph.path,
            graph.quantized,
            recipe.type,
            samples=self._feeds(graph, source, count) if count else [],
            overrides=recipe.overrides,
            progress=progress,
        )

    def _feeds(self, graph: _Graph, source: ModelSource, count: int) -> list[dict[str, Any]]:
        """Inputs of the part that a model is calibrated on."""
        header = onnx.read(graph.path)
        two = self._traced is not None and self._traced[0].matching
        data = self._origin.data
        found = sample_inputs.samples(
            graph.steps,
            [TensorSpec(v.name, v.dtype, v.shape) for v in header.inputs],
            folder=source.path if source.kind == "hf" else source.path.parent,
            data=sample_inputs.meant_for(graph.steps, data) if two else data,
            count=count,
            part="calibration",
        )
        return found.feeds


@dataclass(frozen=True)
class _Graph:
    """One file of the product: its name, the float graph, what makes its inputs, where its
    quantized form goes, and how far the float one is off from torch.
    """

    name: str
    path: Path
    steps: Preprocessing
    quantized: Path
    off: float | None


def _traced(source: ModelSource) -> tuple[Preprocessing, dict[str, TracedModel]]:
    """What makes the inputs, and name -> what is traced to the file of that name."""
    if source.kind == "hf" and source.family in torch_model.BOTH:
        steps, image, text = torch_towers.build(source)
        return steps, {MODEL_FILE: image, torch_towers.TEXT_FILE: text}
    model = torch_model.build(source)
    return model.preprocessing, {MODEL_FILE: model}


def _form(path: Path) -> dict[str, Any]:
    """What a graph takes and gives, for the manifest."""
    header = onnx.read(path)
    return {
        "opset": header.opsets.get("", 0),
        "inputs": [_spec(value) for value in header.inputs],
        "outputs": [_spec(value) for value in header.outputs],
        "parameters": sum(math.prod(tensor.shape) for tensor in header.initializers),
    }


def _is_convolutional(source: ModelSource) -> bool:
    if source.kind != "onnx":
        return torch_model.is_convolutional(source)
    return onnx_graph.is_convolutional(source.path)


def _spec(value: onnx.OnnxValue) -> dict[str, Any]:
    return {"name": value.name, "dtype": value.dtype, "shape": list(value.shape)}
