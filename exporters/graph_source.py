"""A source on its way into a graph: built once, its weights counted, its samples and companions.

Knows torch modules' sources and Preprocessing; never a graph's format.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekit import image_processor, sample_inputs
from edgekit.errors import RecipeError
from edgekit.exporter import ExportOptions, ExportPlan, Progress, TensorPlan
from edgekit.exporters import torch_model
from edgekit.formats import onnx, safetensors
from edgekit.preprocess import FILE as PREPROCESS_FILE
from edgekit.preprocess import Preprocessing, of_folder
from edgekit.recipe import Calibration, Recipe
from edgekit.runtime import TensorSpec
from edgekit.source import ModelSource, TorchModule

TOKENIZER_FILE = "tokenizer.json"
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_SAMPLES = 64  # inputs that a model is calibrated on
_FLOAT_BYTES = 4


class GraphSource:
    """What one export asks of its source, however often: the module, its trace, its samples.

    ``data`` is the file or folder that ``calibration`` was asked to take, None for the built-in.
    """

    def __init__(self) -> None:
        self.data: Path | None = None
        self._traced: torch_model.TracedModel | None = None
        self._own: TorchModule | None = None

    def with_module(self, source: ModelSource) -> ModelSource:
        """A user's function is called once: another call might give other weights."""
        if source.kind not in ("python", "run"):
            return source
        self._own = self._own or torch_model.own_module(source)
        return replace(source, module=self._own)

    def traced(self, source: ModelSource, progress: Progress) -> torch_model.TracedModel:
        """The module with all its weights. Raises as ``torch_model.build``."""
        if self._traced is None:
            progress("load the model", 0, 1)
            self._traced = torch_model.build(self.with_module(source))
            progress("load the model", 1, 1)
        return self._traced

    def calibration(
        self, kind: str, options: ExportOptions, takes: Sequence[str]
    ) -> Calibration | None:
        """What a model is run on for the type ``kind``; ``takes`` are the types that look at
        inputs. Raises RecipeError, UsageError.
        """
        choice = options.calibration
        if kind not in takes:
            if choice not in (None, "none") or options.chunks is not None:
                raise RecipeError(f"{kind} looks at no inputs: a calibration has no use")
            return None
        if choice == "none":
            return None
        self.data = None if choice in (None, "builtin") else Path(str(choice))
        name, digest = sample_inputs.identity(self.data)
        return Calibration(name, digest, options.chunks or _SAMPLES, chunk_tokens=0)

    def samples(
        self,
        source: ModelSource,
        recipe_calibration: Calibration | None,
        preprocessing: Preprocessing,
        specs: Sequence[TensorSpec],
    ) -> list[dict[str, Any]]:
        """The inputs that the calibration stands for; none where there is none."""
        if recipe_calibration is None:
            return []
        return sample_inputs.samples(
            preprocessing,
            specs,
            folder={"hf": source.path, "onnx": source.path.parent}.get(source.kind),
            data=self.data,
            count=recipe_calibration.chunks,
            part="calibration",
        ).feeds

    def plan(
        self, source: ModelSource, recipe: Recipe, weight_bytes: Mapping[str, float]
    ) -> ExportPlan:
        """Sizes from headers and shapes. Matrices and kernels are counted as quantized, whatever
        stays float in the end, vectors as float32; ``weight_bytes`` are the bytes of a value by
        type, scales included.
        """
        tensors = tuple(
            _planned(name, shape, dtype, recipe.type, weight_bytes)
            for name, shape, dtype in _weights(self.with_module(source))
        )
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


def _planned(
    name: str,
    shape: tuple[int, ...],
    source_type: str,
    kind: str,
    weight_bytes: Mapping[str, float],
) -> TensorPlan:
    wanted = kind if len(shape) > 1 else "F32"
    return TensorPlan(
        name=name,
        shape=shape,
        source_type=source_type,
        type=wanted,
        wanted=wanted,
        size_bytes=round(math.prod(shape) * weight_bytes[wanted]),
    )


def companions(
    source: ModelSource, preprocessing: Preprocessing, folder: Path
) -> Iterator[tuple[str, str]]:
    """Write what the runtime needs beside the graph, and name it: (role, file name)."""
    if preprocessing.task == "tensors":
        return
    (folder / PREPROCESS_FILE).write_bytes(preprocessing.to_bytes())
    yield "preprocess", PREPROCESS_FILE
    if preprocessing.text:
        shutil.copyfile(source.file_path(TOKENIZER_FILE), folder / TOKENIZER_FILE)
        yield "tokenizer", TOKENIZER_FILE


def steps_of_onnx(source: ModelSource) -> Preprocessing:
    """What makes the inputs of an ONNX file: known where it lies in a folder that optimum-cli made.

    A model of two encoders in one graph, and one with inputs that nobody can make, takes tensors.
    """
    made = {value.name for value in onnx.read(source.path).inputs}
    if not source.config or "text_config" in source.config:
        return Preprocessing(task="tensors")
    beside = torch_model.companions(source)
    if image_processor.flips_channels(beside["preprocessor"] or {}):
        return Preprocessing(task="tensors")  # blue first: nothing here makes such images
    steps = of_folder(source.config, **beside)
    known = {steps.image.input} if steps.image else {*_TEXT_INPUTS}
    whole = steps.image is not None or TOKENIZER_FILE in source.files
    return steps if made <= known and whole else Preprocessing(task="tensors")
