"""Small TFLite files made by hand from the engine's own schema, as artifacts: what runs without the
exporter's 1.2 GB.

Knows the schema's Python classes; never edgekit's reader, or it would check the reader with itself.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_torch

from edgekit.artifact import MANIFEST, Artifact, ArtifactFile, Manifest
from edgekit.preprocess import FILE as PREPROCESS
from edgekit.preprocess import Preprocessing, TextSteps, of_image
from edgekit.recipe import Recipe

schema = pytest.importorskip(
    "ai_edge_litert.schema_py_generated", reason="ai-edge-litert is not installed"
)
flatbuffers = pytest.importorskip("flatbuffers")

SIDE, LENGTH, WIDTH = tiny_torch.SIDE, 16, 64
PIXELS = 3 * SIDE * SIDE
Grid = tuple[float, int]  # scale and zero point
_TYPES = {"float32": 0, "int32": 2, "int8": 9, "int4": 17}


class Builder:
    """One graph, put together piece by piece."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.description = "made by hand"
        self.model.buffers = [schema.BufferT()]
        self.model.operatorCodes = []
        self.model.metadata = []
        self.graph = schema.SubGraphT()
        self.graph.name = "main"
        self.graph.tensors, self.graph.operators = [], []
        self.graph.inputs, self.graph.outputs = [], []
        self.model.subgraphs = [self.graph]

    def tensor(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> int:
        """One that is computed, or given; its number."""
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, list(shape), _TYPES[dtype], 0
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def constant(self, name: str, values: Any) -> int:
        """A weight."""
        number = self.tensor(name, values.shape, str(values.dtype))
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(values.tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        self.graph.tensors[number].buffer = len(self.model.buffers) - 1
        return number

    def on_grid(self, number: int, scale: float, zero: int = 0) -> int:
        """Its values are ``scale`` times what is stored less ``zero``; its number again."""
        grid = schema.QuantizationParametersT()
        grid.scale, grid.zeroPoint, grid.quantizedDimension = [scale], [zero], 0
        self.graph.tensors[number].quantization = grid
        return number

    def operator(self, kind: str, inputs: list[int], outputs: list[int], options: str = "") -> None:
        """A step; ``options`` names the union's type where there is one."""
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(127, code.builtinCode)
        code.version = 1
        self.model.operatorCodes.append(code)
        made = schema.OperatorT()
        made.opcodeIndex = len(self.model.operatorCodes) - 1
        made.inputs, made.outputs = inputs, outputs
        if options:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            made.builtinOptions = getattr(schema, f"{options}T")()
        self.graph.operators.append(made)

    def ends(self, inputs: dict[str, int], outputs: dict[str, int]) -> None:
        """What the graph takes and gives, by the names of a signature."""
        self.graph.inputs, self.graph.outputs = list(inputs.values()), list(outputs.values())
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = map(_map, (inputs, outputs))
        self.model.signatureDefs = [signature]

    def build(self) -> bytes:
        """The file."""
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def _map(names: dict[str, int]) -> list[Any]:
    found = []
    for name, number in names.items():
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, number
        found.append(entry)
    return found


def dense(name_in: str = "input", name_out: str = "output") -> bytes:
    """An image's pixels times a matrix: ten numbers."""
    rng = np.random.default_rng(0)
    build = Builder()
    given = build.tensor("pixels", (1, 3, SIDE, SIDE))
    flat, out = build.tensor("flat", (1, PIXELS)), build.tensor("classes", (1, 10))
    shape = build.constant("shape", np.array([1, PIXELS], np.int32))
    weights = build.constant("weights", rng.normal(0, 0.05, (10, PIXELS)).astype(np.float32))
    bias = build.constant("bias", rng.normal(0, 0.1, 10).astype(np.float32))
    build.operator("RESHAPE", [given, shape], [flat], "ReshapeOptions")
    build.operator("FULLY_CONNECTED", [flat, weights, bias], [out], "FullyConnectedOptions")
    build.ends({name_in: given}, {name_out: out})
    return build.build()


def table() -> bytes:
    """A vector for every token, and their mask added: enough of an encoder to be pooled."""
    rng = np.random.default_rng(0)
    build = Builder()
    ids, mask = (build.tensor(name, (1, LENGTH), "int32") for name in ("ids", "mask"))
    vectors = build.constant("vectors", rng.normal(0, 1, (300, WIDTH)).astype(np.float32))
    out = build.tensor("hidden", (1, LENGTH, WIDTH))
    build.operator("GATHER", [vectors, ids], [out], "GatherOptions")
    build.ends({"input_ids": ids, "attention_mask": mask}, {"last_hidden_state": out})
    return build.build()


def static(weights: Any, bias: Any, pixels: Grid = (0.02, 0), logits: Grid = (0.1, 0)) -> bytes:
    """A matrix of int8 between ends of int8, (scale, zero point) each: what a stock converter makes
    of ``dense``. ``weights`` [classes, pixels], ``bias`` [classes].
    """
    classes, width = weights.shape
    shape = (1, 3, SIDE, SIDE) if width == PIXELS else (1, width)
    step = float(np.abs(weights).max()) / 127
    build = Builder()
    given, out = (build.tensor(*each) for each in (("given", shape), ("out", (1, classes))))
    image, flat, found = (
        build.on_grid(build.tensor(name, size, "int8"), *grid)
        for name, size, grid in (
            ("image", shape, pixels),
            ("flat", (1, width), pixels),
            ("classes", (1, classes), logits),
        )
    )
    size = build.constant("shape", np.array([1, width], np.int32))
    kernel = build.constant("weights", np.round(weights / step).astype(np.int8))
    shift = build.constant("bias", np.round(bias / (step * pixels[0])).astype(np.int32))
    build.on_grid(kernel, step)
    build.on_grid(shift, step * pixels[0])
    build.operator("QUANTIZE", [given], [image], "QuantizeOptions")
    build.operator("RESHAPE", [image, size], [flat], "ReshapeOptions")
    build.operator("FULLY_CONNECTED", [flat, kernel, shift], [found], "FullyConnectedOptions")
    build.operator("DEQUANTIZE", [found], [out], "DequantizeOptions")
    build.ends({"pixel_values": given}, {"logits": out})
    return build.build()


def four_bits() -> bytes:
    """Floats times a matrix of 4 bits, two values a byte."""
    build = Builder()
    given, out = (build.tensor(name, (1, width)) for name, width in (("given", 32), ("out", 8)))
    kernel = build.constant("weights", np.arange(8 * 16, dtype=np.int8))
    build.graph.tensors[kernel].shape, build.graph.tensors[kernel].type = [8, 32], _TYPES["int4"]
    build.on_grid(kernel, 0.1)
    build.operator("FULLY_CONNECTED", [given, kernel, -1], [out], "FullyConnectedOptions")
    build.ends({"x": given}, {"y": out})
    return build.build()


def artifacts(folder: Path) -> dict[str, Path]:
    """A classifier of images, an encoder of texts and a bare module, as artifacts."""
    image = of_image(
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "labels": list(tiny_torch.LABELS)},
        "pixel_values",
        (1, 3, SIDE, SIDE),
    )
    text = Preprocessing(
        "text-embedding", text=TextSteps("tokenizer.json", LENGTH, "mean", True, 0, True)
    )
    made = {
        "image": artifact(folder / "image", dense("pixel_values", "logits"), image),
        "module": artifact(folder / "module", dense()),
    }
    tokenizer = tiny_torch.bert_folder(folder / "bert") / "tokenizer.json"
    return made | {"text": artifact(folder / "text", table(), text, tokenizer)}


def artifact(
    folder: Path, model: bytes, steps: Preprocessing | None = None, tokenizer: Path | None = None
) -> Path:
    """Write the files and a manifest that fits them."""
    folder.mkdir(parents=True)
    (folder / "model.tflite").write_bytes(model)
    roles = [("model", "model.tflite")]
    if steps is not None:
        (folder / PREPROCESS).write_bytes(steps.to_bytes())
        roles.append(("preprocess", PREPROCESS))
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
        roles.append(("tokenizer", "tokenizer.json"))
    files = [
        ArtifactFile(role, name, len(data), hashlib.sha256(data).hexdigest())
        for role, name in roles
        for data in [(folder / name).read_bytes()]
    ]
    source = {"spec": "tiny", "kind": "module", "family": "tiny", "revision": None}
    manifest = Manifest(
        format="tflite",
        recipe=Recipe("tflite", "F32"),
        source=source | {"quantized": None, "sha256": {}},
        files=tuple(files),
        details={},
        versions={"edgekit": "0.1.0"},
    )
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return Artifact.open(folder).path
