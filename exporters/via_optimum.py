"""Lets optimum-cli write the graph of a Hugging Face folder, in the place of edgekit's own tracer.

Knows its arguments, and how its graph becomes one of the same form as the tracer's: the outputs
that are asked for, and sizes that are fixed. Must never run its code in this process, nor trust
what it wrote: the caller holds the graph against torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from edgekit import _proc
from edgekit.errors import EdgekitError, ExportError, RecipeError
from edgekit.exporter import Progress
from edgekit.exporters import onnx_graph, optimum_environment, torch_model
from edgekit.exporters.onnx_graph import Graph
from edgekit.exporters.torch_model import TracedModel
from edgekit.exporters.torch_to_onnx import OPSET
from edgekit.model_folder import CONFIG
from edgekit.source import ModelSource

NAME = "optimum"
_TASKS = {
    "image-classification": "image-classification",
    "image-features": "feature-extraction",
    "text-classification": "text-classification",
    "text-embedding": "feature-extraction",
}
_LIMIT_S = 3600
# In the environment: the folder is here, and nothing else is to be fetched.
_RUN = (
    "import os; os.environ.update(HF_HUB_OFFLINE='1', HF_HUB_DISABLE_TELEMETRY='1')\n"
    "from optimum.commands.optimum_cli import main; main()"
)


def check(source: ModelSource) -> None:
    """Whether ``write`` takes this kind of model. Raises RecipeError."""
    if source.kind != "hf" or source.family not in (*torch_model.VISION, *torch_model.TEXT):
        raise RecipeError(
            f"optimum-cli is asked for folders of one encoder or classifier, not for {source.spec}",
            hint="leave out --via",
        )


def write(source: ModelSource, traced: TracedModel, path: Path, progress: Progress) -> None:
    """Write the graph of ``source`` to ``path``, with the inputs, outputs and free axes of
    ``traced``.

    Raises ExportError where optimum-cli fails or its graph is another one, and as
    ``optimum_environment.python``.
    """
    python = optimum_environment.python(progress)
    progress("optimum-cli", 0, 1)
    with tempfile.TemporaryDirectory(prefix="optimum-", dir=path.parent) as name:
        folder, made = Path(name) / "model", Path(name) / "made"
        folder.mkdir()
        # What was checked, without the tokenizer: version 4 cannot read what version 5 writes,
        # and the artifact takes it from the source.
        for file in source.files:
            if file == CONFIG or ".safetensors" in file:
                (folder / file).symlink_to(source.file_path(file))
        task = _TASKS[traced.preprocessing.task]
        argv = [str(python), "-I", "-c", _RUN, "export", "onnx", "--model", str(folder)]
        argv += ["--task", task, "--library", "transformers", "--opset", str(OPSET)]
        argv += ["--device", "cpu", str(made)]
        try:
            _proc.run(argv, timeout_s=_LIMIT_S)
        except EdgekitError as error:
            raise ExportError(
                f"optimum-cli failed: {error.message.rpartition(': ')[2][:300]}",
                hint="leave out --via",
            ) from None
        model = onnx_graph.load(made / "model.onnx")
    _like(model, traced)
    onnx_graph.save(model, path)
    progress("optimum-cli", 1, 1)


def _like(model: Any, traced: TracedModel) -> None:
    """Drop other outputs, and fix every size that is not free. Raises ExportError."""
    graph = model.graph
    for what, values, names in (
        ("takes", graph.input, traced.inputs),
        ("gives", graph.output, traced.outputs),
    ):
        found = {value.name: value for value in values}
        missing = sorted(set(names) - set(found))
        if missing or (what == "takes" and len(found) > len(names)):
            raise ExportError(
                f"optimum-cli's graph {what} {', '.join(found)}, not {', '.join(names)}",
                hint="leave out --via",
            )
        kept = [type(found[name]).FromString(found[name].SerializeToString()) for name in names]
        del values[:]
        values.extend(kept)
    for value, example in zip(graph.input, traced.example_inputs, strict=True):
        free = traced.dynamic.get(value.name, {})
        for axis, size in enumerate(example.shape):
            place = value.type.tensor_type.shape.dim[axis]
            if axis in free:
                place.dim_param = free[axis]
            else:
                place.dim_value = size
    Graph(model).finish()
