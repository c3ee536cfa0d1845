"""Language models to ONNX: a Hugging Face folder or a GGUF file in; a graph with its tokenizer out.

Decides types and the order of the work; what a family computes, how a graph is built and how a
matrix is quantized, its neighbours know. Never imports a runtime of edgekit.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from edgekit import language_model, quant
from edgekit.errors import RecipeError
from edgekit.exporter import ExportOptions, ExportPlan, Product, Progress, TensorPlan
from edgekit.exporters import hf_to_gguf, lm_graph, lm_quantizer, to_hf
from edgekit.exporters.arch.decoder import Decoder
from edgekit.exporters.arch.family import Family, family_of
from edgekit.exporters.lm_weights import Weights, shape
from edgekit.exporters.to_hf_tokenizer import GgufTokenizer
from edgekit.exporters.tokenizer_files import TokenizerFiles
from edgekit.formats import gguf
from edgekit.language_model import LanguageModel, Turning
from edgekit.recipe import Recipe
from edgekit.registry import GGUF_FAMILIES
from edgekit.source import ModelSource
from edgekit.source import source as resolve

MODEL_FILE = "model.onnx"
_DEFAULT_BITS = 4
_FLOAT_BYTES = 4
_BESIDE_BYTES = 1500 << 20  # a protobuf holds 2 GiB at most
_PACKAGES = ("gguf", "numpy", "onnx")
# llama.cpp ends an answer at these too, whatever a folder calls its EOS.
_ENDS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"),
    *("<|endoftext|>", "<|end_of_text|>"),
)


def takes(source: ModelSource) -> bool:
    """Whether ``source`` is a language model."""
    if source.kind == "gguf":
        return True
    return source.kind == "hf" and source.family in list(GGUF_FAMILIES)


class OnnxLanguageExporter:
    """One export (edgekit.exporter.Exporter)."""

    def __init__(self) -> None:
        self._text = b""

    def recipe(self, source: ModelSource, options: ExportOptions) -> Recipe:
        """``--bits`` or ``--type`` to a precision; a calibration text to its hash."""
        quant.check_choice(options.bits, options.type)
        if options.adapter is not None:
            raise RecipeError("an adapter can only be merged into a GGUF", hint="--format gguf")
        if options.fusion != "auto":
            raise RecipeError(
                "a language model is built of fused operators", hint="drop --no-fusion"
            )
        if options.type is not None:
            kind = quant.onnx_type(options.type)
        else:
            kind = quant.onnx_language_preset(options.bits or _DEFAULT_BITS)
        if kind not in quant.ONNX_LANGUAGE_TYPES:
            raise RecipeError(
                f"language models are not exported as {kind}",
                hint=f"choose one of {', '.join(quant.ONNX_LANGUAGE_TYPES)}",
            )
        calibration, self._text = lm_quantizer.calibration(kind, options)
        return Recipe(
            format="onnx", type=kind, calibration=calibration, overrides=options.overrides
        )

    def plan(self, source: ModelSource, recipe: Recipe) -> ExportPlan:
        """Sizes from headers alone."""
        decoder = _family(source).decoder()
        types = lm_quantizer.types(decoder, recipe)
        tensors = tuple(_planned(decoder, types, source.quantized or "float"))
        size_bytes = sum(tensor.size_bytes for tensor in tensors)
        elements = sum(math.prod(tensor.shape) for tensor in tensors)
        floats = _FLOAT_BYTES * elements
        return ExportPlan(
            recipe=recipe,
            size_bytes=size_bytes,
            scratch_bytes=floats if source.kind == "gguf" else 0,
            bits_per_weight=size_bytes * 8 / max(1, elements),
            tensors=tensors,
            reference_bytes=floats * (2 if source.kind == "gguf" else 1),
        )

    def run(
        self,
        source: ModelSource,
        hashes: dict[str, str],
        plan: ExportPlan,
        folder: Path,
        progress: Progress,
    ) -> Product:
        """Quantize, build the graph, and lay the tokenizer beside it."""
        recipe, model = plan.recipe, folder / MODEL_FILE
        with _as_folder(source, folder, progress) as found:
            family = family_of(found)
            weights = Weights(family.decoder(), found)
            files = _companions(found, family, recipe.type, folder)
            made = lm_quantizer.quantize(weights, recipe, self._text, folder, progress)
            _write(weights, made.vectors, made.matrices, model, plan.size_bytes, progress)
        names = [("model", MODEL_FILE)]
        names += [("weights", path.name) for path in sorted(folder.glob(f"{MODEL_FILE}.*"))]
        details = {
            "task": "text-generation",
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "parameters": sum(math.prod(tensor.shape) for tensor in plan.tensors),
            "requantized_from": source.quantized,
            **made.details,
        }
        return Product((*names, *files), details, _PACKAGES)

    def reference(
        self, source: ModelSource, recipe: Recipe, path: Path, progress: Progress
    ) -> Path:
        """The same graph in float32."""
        with _as_folder(source, path.parent, progress) as found:
            family = family_of(found)
            weights = Weights(family.decoder(), found)
            if not language_model.is_one(path):
                _companions(found, family, "F32", path.parent)
            elements = sum(math.prod(shape(weights.decoder, name)) for name in weights.names())
            size_bytes = _FLOAT_BYTES * elements
            _write(weights, weights, _floats(weights), path, size_bytes, progress)
        return path


def _floats(weights: Weights) -> lm_graph.Matrices:
    return lambda name: lm_graph.Plain(weights.matrix(name))


def _write(
    weights: Weights,
    vectors: lm_graph.Vectors,
    matrices: lm_graph.Matrices,
    path: Path,
    size_bytes: int,
    progress: Progress,
) -> None:
    names = weights.names()
    done = 0

    def counted(name: str) -> lm_graph.Plain | lm_graph.Blocks:
        nonlocal done
        done += 1
        progress("write the graph", done, len(names))
        return matrices(name)

    beside = size_bytes > _BESIDE_BYTES
    lm_graph.write(weights.decoder, vectors, counted, path, beside=beside)


# Sources


def _family(source: ModelSource) -> Family:
    """The family of a folder, or of what a GGUF file becomes, from its header alone."""
    if source.kind == "hf":
        return family_of(source)
    config = to_hf.config(source)
    family: Family = GGUF_FAMILIES.load(str(config["model_type"]))(config)
    return family


@contextmanager
def _as_folder(source: ModelSource, beside: Path, progress: Progress) -> Iterator[ModelSource]:
    """A Hugging Face folder of the source; of a GGUF file it lasts as long as the block."""
    if source.kind == "hf":
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=beside) as name:
        out = Path(name) / "folder"
        to_hf.write(source, out, None, progress=progress)
        yield resolve(out)


# What lies beside the graph


def _companions(
    source: ModelSource, family: Family, kind: str, folder: Path
) -> list[tuple[str, str]]:
    files = TokenizerFiles(source)
    decoder = family.decoder()
    facts = _facts(files, source, family, decoder, kind)
    (folder / language_model.FILE).write_bytes(facts.to_bytes())
    (folder / language_model.TOKENIZER).write_bytes(_tokenizer(source, files))
    found = [("language", language_model.FILE), ("tokenizer", language_model.TOKENIZER)]
    if template := files.chat_templates().get("default"):
        (folder / language_model.TEMPLATE).write_bytes(template.encode())
        found.append(("template", language_model.TEMPLATE))
    return found


def _tokenizer(source: ModelSource, files: TokenizerFiles) -> bytes:
    """tokenizer.json: the source's own, or made of its SentencePiece model."""
    if files.json:
        return source.file_path("tokenizer.json").read_bytes()
    with tempfile.TemporaryDirectory(prefix="edgekit-plan-") as name:
        path = Path(name) / "vocabulary.gguf"
        hf_to_gguf.header_only(source, path, "F32")
        made = GgufTokenizer(gguf.read(path)).tokenizer_json()
    return json.dumps(made, ensure_ascii=False).encode()


def _facts(
    files: TokenizerFiles, source: ModelSource, family: Family, decoder: Decoder, kind: str
) -> LanguageModel:
    special = files.special_ids(decoder.vocab_size)
    bos = special.get("bos")
    spm = not files.json or bool(files.model.get("byte_fallback"))
    adds = files.ends_added().get("bos", spm)
    adds = family.tokenizer_metadata().get("tokenizer.ggml.add_bos_token", adds)
    wanted = source.config.get("eos_token_id")
    ids = [*(wanted if isinstance(wanted, list) else [wanted]), special.get("eos")]
    ids += [token.id for token in files.added if token.text in _ENDS]
    ends = {id for id in ids if isinstance(id, int) and 0 <= id < decoder.vocab_size}
    return LanguageModel(
        family=source.family,
        type=kind,
        context_length=decoder.context_length,
        vocab_size=decoder.vocab_size,
        width=decoder.width,
        layers=decoder.layers,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        bos=bos,
        adds_bos=adds and bos is not None,
        eos=special.get("eos", min(ends, default=None)),
        ends=tuple(sorted(ends)),
        turning=_turning(decoder),
    )


def _turning(decoder: Decoder) -> tuple[Turning, ...]:
    kinds = [decoder.rotation, *([decoder.local_rotation] if decoder.local_rotation else [])]
    found = []
    for rotation in kinds:
        layers = tuple(i for i in range(decoder.layers) if decoder.rotation_of(i) is rotation)
        frequencies = np.zeros(decoder.head_dim // 2, np.float32)
        frequencies[: rotation.turning] = rotation.frequencies
        if layers:
            found.append(Turning(layers, tuple(float(each) for each in frequencies)))
    return tuple(found)


# Plans


def _planned(decoder: Decoder, types: dict[str, str], stored: str) -> Iterator[TensorPlan]:
    for name, kind in types.items():
        rows, columns = shape(decoder, name)
        yield TensorPlan(
            name=name,
            shape=(rows, columns),
            source_type=stored,
            type=kind,
            wanted=kind,
            size_bytes=lm_quantizer.size_bytes(kind, rows, columns),
        )
