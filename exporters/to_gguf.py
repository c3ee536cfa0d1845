"""The GGUF exporter: a Hugging Face folder or a GGUF file in, a quantized GGUF file out.

Decides types, calibration and scratch files; how tensors are named, quantized or calibrated on is
known by its neighbours on this shelf. Never imports a runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from edgekit import quant
from edgekit.errors import ExportError, OutOfSpaceError, RecipeError, UnsupportedModelError
from edgekit.exporter import ExportOptions, ExportPlan, Product, Progress, TensorPlan
from edgekit.exporters import hf_to_gguf, imatrix, lora, quantizer
from edgekit.formats import gguf
from edgekit.recipe import Calibration, Recipe
from edgekit.source import ModelSource

MODEL_FILE = "model.gguf"
IMATRIX_FILE = "imatrix.gguf"
ADAPTER_FILE = "adapter.gguf"
_Q8_0 = gguf.TYPES[8]
_SCRATCH_FILE = "scratch.gguf"
_FAST_FILE = "fast.gguf"
_DEFAULT_BITS = 4
_REFERENCE_TYPE = "F16"


class GgufExporter:
    """One export: ``recipe`` first, then ``plan``, then ``run`` (edgekit.exporter.Exporter)."""

    def __init__(self) -> None:
        self._calibration_text = b""
        self._adapter: lora.Adapter | None = None

    def recipe(self, source: ModelSource, options: ExportOptions) -> Recipe:
        """``--bits`` or ``--type`` to a type; calibration texts and adapters to their hashes."""
        if source.kind not in ("hf", "gguf"):
            raise UnsupportedModelError(
                f"a GGUF holds a language model, and {source.spec} is none that edgekit knows",
                hint="--format onnx takes any torch module and any ONNX file",
            )
        if options.fusion != "auto":
            raise RecipeError("a GGUF has no operators to fuse", hint="drop --no-fusion")
        quant.check_choice(options.bits, options.type)
        if options.type is not None:
            kind = quant.gguf_type(options.type)
            wanted = quant.wants_imatrix(kind)
        else:
            preset = quant.gguf_preset(options.bits or _DEFAULT_BITS)
            kind, wanted = preset.type, preset.imatrix
        if options.adapter is not None:
            if source.kind != "hf":
                raise RecipeError(
                    "an adapter can only be merged into a Hugging Face folder",
                    hint="edgekit convert MODEL.gguf --out DIR makes one",
                )
            self._adapter = lora.open_adapter(Path(options.adapter))
        return Recipe(
            format="gguf",
            type=kind,
            calibration=self._calibration(kind, options, wanted),
            overrides=options.overrides,
            adapter=self._adapter.sha256 if self._adapter else None,
            adapter_mode=options.adapter_mode,
        )

    def _calibration(self, kind: str, options: ExportOptions, wanted: bool) -> Calibration | None:
        choice = options.calibration
        if choice == "none" or (choice is None and not wanted):
            if options.chunks is not None:
                raise RecipeError(
                    f"{kind} is made without an importance matrix: no chunks to count"
                )
            return None
        if kind in quant.FLOAT_TYPES:
            raise RecipeError(f"{kind} is not quantized: a calibration text has no use")
        found, self._calibration_text = imatrix.calibration(
            choice or imatrix.BUILTIN, options.chunks
        )
        return found

    def plan(self, source: ModelSource, recipe: Recipe) -> ExportPlan:
        """Sizes and types from headers alone: a Hugging Face folder's weights are not read."""
        with tempfile.TemporaryDirectory(prefix="edgekit-plan-") as folder:
            path, scratch_bytes = source.path, 0
            if source.kind == "hf":
                path = Path(folder) / _SCRATCH_FILE
                hf_to_gguf.header_only(source, path, _float_type(recipe))
                if self._adapter:
                    self._adapter.check(source)
                scratch_bytes = 0 if recipe.type in quant.FLOAT_TYPES else path.stat().st_size
            header = gguf.read(path)
            rows = self._types(path, header, recipe, source)
        if recipe.calibration and _needs_fast_copy(header):
            scratch_bytes += header.parameters * _Q8_0.type_size // _Q8_0.block_size
        missing = [tensor.name for tensor in header.tensors if tensor.name not in rows]
        if missing:
            raise ExportError(f"llama.cpp would leave out the tensor '{missing[0]}'")
        tensors = tuple(_tensor_plan(tensor, rows[tensor.name]) for tensor in header.tensors)
        data_bytes = sum(tensor.size_bytes for tensor in tensors)
        elements = sum(tensor.elements for tensor in header.tensors)
        return ExportPlan(
            recipe=recipe,
            size_bytes=header.data_offset + data_bytes,
            scratch_bytes=scratch_bytes,
            bits_per_weight=data_bytes * 8 / max(1, elements),
            tensors=tensors,
            warnings=tuple(_warnings(source, recipe)),
            reference_bytes=_reference_bytes(source, header),
        )

    @staticmethod
    def _types(
        path: Path, header: gguf.GgufHeader, recipe: Recipe, source: ModelSource
    ) -> dict[str, quantizer.TensorType]:
        if source.kind == "hf" and recipe.type in quant.FLOAT_TYPES:
            return {
                t.name: quantizer.TensorType(t.name, t.type, t.type, t.type) for t in header.tensors
            }
        rows = quantizer.plan(
            path, recipe.type, imatrix=recipe.calibration is not None, overrides=recipe.overrides
        )
        return {row.name: row for row in rows}

    def run(
        self,
        source: ModelSource,
        hashes: dict[str, str],
        plan: ExportPlan,
        folder: Path,
        progress: Progress,
    ) -> Product:
        """Write the model (and the importance matrix it was made with) into ``folder``."""
        recipe = plan.recipe
        files = [("model", MODEL_FILE)]
        model = folder / MODEL_FILE
        matrix: Path | None = None
        patch = self._adapter.patch if self._adapter and recipe.adapter_mode == "merge" else None
        packages = ["gguf", "numpy"]
        if source.kind == "hf" and recipe.type in quant.FLOAT_TYPES:
            hf_to_gguf.write(source, model, recipe.type, progress=_floats(progress), patch=patch)
        else:
            packages.append("llama-cpp-python")
            with self._float_file(source, recipe, folder, progress, patch) as path:
                matrix = self._matrix(path, hashes, recipe, folder, progress)
                quantizer.quantize(
                    path,
                    model,
                    recipe.type,
                    imatrix=matrix,
                    overrides=recipe.overrides,
                    on_tensor=partial(progress, "quantize"),
                )
            if matrix:
                (folder / IMATRIX_FILE).write_bytes(matrix.read_bytes())
                files.append(("imatrix", IMATRIX_FILE))
        if self._adapter and recipe.adapter_mode == "keep":
            lora.write_gguf(self._adapter, source, folder / ADAPTER_FILE)
            files.append(("adapter", ADAPTER_FILE))
        details = _details(model, plan, source)
        if matrix:
            details["imatrix"] = imatrix.facts(matrix)
        return Product(tuple(files), details, tuple(packages))

    def reference(
        self, source: ModelSource, recipe: Recipe, path: Path, progress: Progress
    ) -> Path:
        """The source as F16, with the adapter that the recipe merges; for a float recipe in the
        source's own float types, so that what F16 or BF16 cost can be seen.

        A source beyond the range of F16 keeps its own types too.
        """
        if source.kind == "gguf":
            main_type = gguf.read(source.path).main_type()
            if main_type == _REFERENCE_TYPE or (
                main_type in quant.FLOAT_TYPES and recipe.type in quant.FLOAT_TYPES
            ):
                return source.path
            quantizer.quantize(
                source.path,
                path,
                _REFERENCE_TYPE,
                imatrix=None,
                overrides=(),
                on_tensor=partial(progress, "float reference"),
            )
            return path
        patch = self._adapter.patch if self._adapter and recipe.adapter_mode == "merge" else None
        dtype = "native" if recipe.type in quant.FLOAT_TYPES else _REFERENCE_TYPE

        def on_bytes(_tensor: str, done: int, total: int) -> None:
            progress("float reference", done, total)

        try:
            hf_to_gguf.write(source, path, dtype, progress=on_bytes, patch=patch)
        except OutOfSpaceError:
            raise
        except ExportError:
            hf_to_gguf.write(source, path, "native", progress=on_bytes, patch=patch)
        return path

    @staticmethod
    @contextmanager
    def _float_file(
        source: ModelSource,
        recipe: Recipe,
        folder: Path,
        progress: Progress,
        patch: Callable[[str, Any], Any] | None,
    ) -> Iterator[Path]:
        """The GGUF to quantize from: the source itself, or a lossless copy of the folder."""
        if source.kind == "gguf":
            yield source.path
            return
        scratch = folder / _SCRATCH_FILE
        hf_to_gguf.write(
            source, scratch, _float_type(recipe), progress=_floats(progress), patch=patch
        )
        yield scratch
        scratch.unlink()

    def _matrix(
        self,
        path: Path,
        hashes: dict[str, str],
        recipe: Recipe,
        folder: Path,
        progress: Progress,
    ) -> Path | None:
        if recipe.calibration is None:
            return None
        key = dict(hashes)
        if self._adapter and recipe.adapter_mode == "merge":
            key["adapter"] = self._adapter.sha256
        kept, found = imatrix.cached(key, recipe.calibration)
        if not found:
            with _fast_copy(path, folder) as model:
                imatrix.compute(
                    model,
                    recipe.calibration,
                    self._calibration_text,
                    kept,
                    partial(progress, "importance matrix"),
                )
        return kept


@contextmanager
def _fast_copy(path: Path, folder: Path) -> Iterator[Path]:
    """The model in a type that the engine multiplies fast: some types have no kernel for batches.

    Q4_1 takes 2.3 times as long as Q8_0, and int8 is exact enough for statistics.
    """
    if not _needs_fast_copy(gguf.read(path)):
        yield path
        return
    copy = folder / _FAST_FILE
    quantizer.quantize(
        path, copy, "Q8_0", imatrix=None, overrides=(), on_tensor=lambda done, total: None
    )
    yield copy
    copy.unlink()


def _needs_fast_copy(header: gguf.GgufHeader) -> bool:
    return header.main_type() not in (*quant.FLOAT_TYPES, "Q8_0", "Q4_0")


def _reference_bytes(source: ModelSource, header: gguf.GgufHeader) -> int:
    """At most what ``reference`` writes: F16 matrices, or all of a folder in its own types."""
    if source.kind == "gguf" and header.main_type() == _REFERENCE_TYPE:
        return 0
    floats = sum(tensor.elements * (2 if len(tensor.shape) > 1 else 4) for tensor in header.tensors)
    return max(header.data_offset + floats, source.size_bytes if source.kind == "hf" else 0)


def _floats(progress: Progress) -> Progress:
    return lambda _tensor, done, total: progress("convert to GGUF", done, total)


def _float_type(recipe: Recipe) -> str:
    """The type of the float file: the asked one, or the source's own (lossless)."""
    return recipe.type if recipe.type in quant.FLOAT_TYPES else "native"


def _tensor_plan(tensor: gguf.GgufTensor, row: quantizer.TensorType) -> TensorPlan:
    kind = gguf.TYPES[quantizer.tensor_type_id(row.type)]
    return TensorPlan(
        name=tensor.name,
        shape=tensor.shape,
        source_type=tensor.type,
        type=row.type,
        wanted=row.wanted,
        size_bytes=tensor.elements // kind.block_size * kind.type_size,
    )


def _warnings(source: ModelSource, recipe: Recipe) -> Iterator[str]:
    if source.quantized:
        yield (
            f"the source is already quantized ({source.quantized}): its errors stay,"
            f" and {recipe.type} adds its own"
        )
    if quant.wants_imatrix(recipe.type) and recipe.calibration is None:
        yield f"{recipe.type} without an importance matrix loses more: docs/export.md says why"


def _details(model: Path, plan: ExportPlan, source: ModelSource) -> dict[str, Any]:
    """Facts about the file that was made, read back from the file itself."""
    header = gguf.read(model)
    return {
        "architecture": header.architecture,
        "parameters": header.parameters,
        "bits_per_weight": round(header.bits_per_weight, 4),
        "types": dict(sorted(header.types().items())),
        "requantized_from": source.quantized,
        "fallbacks": [
            {"tensor": tensor.name, "wanted": tensor.wanted, "type": tensor.type}
            for tensor in plan.fallbacks
        ],
    }
