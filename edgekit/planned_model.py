"""The model to plan for, from as little as there is: a config.json, a header, an artifact.

Knows where the facts of a model stand; never reads a weight, and runs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import (
    graph_file,
    hub,
    language_header,
    language_model,
    model_folder,
    onnx_cost,
    quant,
    tflite_cost,
    vision_cost,
)
from edgekit.artifact import Artifact, is_artifact
from edgekit.errors import SourceError, UsageError
from edgekit.formats import gguf, json_file, onnx, tflite
from edgekit.formats.foreign import Malformed
from edgekit.formats.gguf import GgufHeader
from edgekit.model_shape import header_of
from edgekit.registry import RUNTIME_OF_FORMAT
from edgekit.source import BUILT_IN, source
from edgekit.tensor_types import retyped
from edgekit.unsafe_config import refuse_code
from edgekit.vision_cost import VisionCost

_BYTES = 1 << 22  # of a config.json
_MAX_LAYERS, _MAX_SIZE = 4096, 1 << 31
_SIZES = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "attention.sliding_window"),
    *("expert_count", "expert_used_count"),
)
_BITS = 4  # where neither the model nor the user says more


@dataclass(frozen=True)
class PlannedModel:
    """A language model's header, or a vision model's cost; ``type`` is what its weights will be,
    ``runtime`` what runs it.

    ``lossy_bytes`` is the size of weights that were quantized before: more bits would hold no more.
    Of a graph's file that stays as it is ``stored`` has the bytes of its weights by dtype, and
    ``assumed`` what the sizes were taken for that it leaves open.
    """

    name: str
    type: str
    runtime: str = RUNTIME_OF_FORMAT["gguf"]
    header: GgufHeader | None = None
    vision: VisionCost | None = None
    lossy_bytes: int | None = None
    stored: Mapping[str, int] | None = None
    assumed: tuple[str, ...] = ()

    def language(self) -> GgufHeader:
        """The header; UsageError for a vision model."""
        if self.header is None:
            raise UsageError(f"{self.name} is a vision model")
        return self.header


def planned(
    model: str | Path, *, bits: int | None = None, file_type: str | None = None
) -> PlannedModel:
    """``model`` is a built-in name, an artifact, a GGUF file (its beginning is enough), an ONNX or
    a TFLite file, a Hugging Face folder or its config.json, or a hub id, of which only that file is
    fetched.

    ``bits`` or ``file_type`` say what it would be exported to; without them a GGUF file stays as it
    is, and others get 4 bits. Vision models have 8 or 32 bits; without a wish ONNX and TFLite files
    stay as they are.
    Raises UsageError, SourceError, ArtifactError.
    """
    if bits is not None and file_type is not None:
        raise UsageError("give --bits or --type, not both")
    name = str(model)
    path = Path(os.path.expanduser(model))
    if name in BUILT_IN and not os.path.lexists(path):
        path = source(name).path
    elif not os.path.lexists(path) and isinstance(model, str) and hub.check_repo_id(model):
        return _of_config(name, _parsed(name, hub.fetch_config(model)), bits, file_type)
    elif not os.path.lexists(path):
        raise SourceError(
            f"{path} does not exist",
            hint="give an artifact, a .gguf, .onnx or .tflite file, a folder with config.json, or a"
            " hub id",
        )
    if is_artifact(path):
        artifact = Artifact.open(path)
        artifact.verify_sizes()
        if artifact.format in _OF_GRAPHS:
            return _OF_GRAPHS[artifact.format](name, artifact.model_path, bits, file_type)
        return _of_header(name, gguf.read(artifact.model_path), bits, file_type)
    if os.path.isdir(path):
        return _of_config(name, json_file.read(path / model_folder.CONFIG, _BYTES), bits, file_type)
    if path.suffix.lower() == ".json":
        return _of_config(name, json_file.read(path, _BYTES), bits, file_type)
    if path.suffix.lower() == ".gguf":
        with model_folder.as_source(path):
            return _of_header(name, gguf.read(path, whole=False), bits, file_type)
    if kind := graph_file.FORMATS.get(path.suffix.lower()):
        with model_folder.as_source(path):
            return _OF_GRAPHS[kind](name, path, bits, file_type)
    raise SourceError(
        f"{path} is no model that can be planned for",
        hint="give an artifact, a .gguf, .onnx or .tflite file, or a folder with config.json",
    )


def _of_onnx(name: str, path: Path, bits: int | None, file_type: str | None) -> PlannedModel:
    """As the file stands; of a float file also what 8 bits would bring."""
    if language_model.is_one(path):
        return _of_onnx_language(name, path, bits, file_type)
    _check_vision(bits, file_type)
    found = onnx_cost.cost(onnx.read(path, whole=False))
    wanted, stands = _vision_types(name, found.is_int8, bits)
    return PlannedModel(
        name,
        wanted,
        RUNTIME_OF_FORMAT["onnx"],
        vision=found.cost,
        stored=found.weight_bytes if wanted == stands else None,
        assumed=found.assumed,
    )


def _of_tflite(name: str, path: Path, bits: int | None, file_type: str | None) -> PlannedModel:
    """As the file stands; of a float file also what 8 bits would bring."""
    _check_vision(bits, file_type)
    header = tflite.read(path)
    stored: dict[str, int] = {}
    for tensor in header.constants:
        stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.size_bytes
    narrow = sum(size for dtype, size in stored.items() if dtype.endswith(("int8", "int4")))
    wanted, stands = _vision_types(name, 2 * narrow > sum(stored.values()), bits)
    sizes = (f"{each} 1" for each, n in header.inputs.items() if None in _shape(header, n))
    return PlannedModel(
        name,
        wanted,
        RUNTIME_OF_FORMAT["tflite"],
        vision=tflite_cost.cost(header),
        stored=stored if wanted == stands else None,
        assumed=tuple(sizes),
    )


def _shape(header: tflite.TfliteHeader, number: int) -> tuple[int | None, ...]:
    return header.main.tensors[number].shape


def _vision_types(name: str, is_int8: bool, bits: int | None) -> tuple[str, str]:
    """What is wanted, and what the file has now."""
    stands = "int8" if is_int8 else "F32"
    wanted = {None: stands, 8: "int8", 32: "F32"}[bits]
    if wanted == "F32" and is_int8:
        raise UsageError(f"{name} has 8 bits already: more would hold no more")
    return wanted, stands


def _of_onnx_language(
    name: str, path: Path, bits: int | None, file_type: str | None
) -> PlannedModel:
    if bits is not None or file_type is not None:
        raise UsageError(
            "an ONNX language model is planned as it stands",
            hint="plan for the model that it was made of with --bits or --type",
        )
    header = language_header.read(path, whole=False)
    _check_sizes(name, header)
    kind = language_model.beside(path).type
    return PlannedModel(
        name,
        kind,
        RUNTIME_OF_FORMAT["onnx"],
        header=header,
        lossy_bytes=None if kind in quant.FLOAT_TYPES else weight_bytes(header),
    )


_OF_GRAPHS = {"onnx": _of_onnx, "tflite": _of_tflite}


def _check_vision(bits: int | None, file_type: str | None) -> None:
    if file_type is not None or bits not in (None, 8, 32):
        raise UsageError("such a model is planned with --bits 8 or --bits 32")


def in_type(model: PlannedModel, file_type: str) -> PlannedModel:
    """The same language model as if it were exported to another type."""
    header = retyped(model.language(), file_type)
    return PlannedModel(model.name, file_type, header=header, lossy_bytes=model.lossy_bytes)


def _wanted(bits: int | None, file_type: str | None) -> str | None:
    if file_type is not None:
        return quant.gguf_type(file_type)
    return None if bits is None else quant.gguf_preset(bits).type


def _of_header(
    name: str, header: GgufHeader, bits: int | None, file_type: str | None
) -> PlannedModel:
    _check_sizes(name, header)
    wanted, main = _wanted(bits, file_type), header.main_type()
    size = None if main in quant.FLOAT_TYPES else weight_bytes(header)
    if wanted is not None:
        header = retyped(header, wanted)
    return PlannedModel(name, wanted or _called(header), header=header, lossy_bytes=size)


def _check_sizes(name: str, header: GgufHeader) -> None:
    """Refuse sizes that would make costs endless or absurd: the file may be a stranger's."""
    for key in _SIZES:
        value = header.metadata.get(f"{header.architecture}.{key}", 0)
        most = _MAX_LAYERS if key == "block_count" else _MAX_SIZE
        for each in value if isinstance(value, list) else [value]:
            if type(each) is not int or not 0 <= each <= most:
                raise SourceError(f"{name}: {key} cannot be {str(each)[:40]}")


def _called(header: GgufHeader) -> str:
    """The type that the file says it has (a mixture, such as Q4_K_M), else that of most weights."""
    number = header.metadata.get("general.file_type")
    known = {value: name for name, value in quant.GGUF_FTYPES.items()}
    return known.get(number, header.main_type()) if isinstance(number, int) else header.main_type()


def weight_bytes(header: GgufHeader) -> int:
    """Bytes of all tensors."""
    return sum(tensor.size_bytes for tensor in header.tensors)


def _parsed(name: str, data: bytes) -> Any:
    try:
        return json_file.parse(data)
    except Malformed as error:
        raise SourceError(f"the config.json of {name} {error}") from None


def _of_config(name: str, config: Any, bits: int | None, file_type: str | None) -> PlannedModel:
    if not isinstance(config, Mapping):
        raise SourceError(f"the config.json of {name} is not a JSON object")
    refuse_code(config, origin=f"{name}: config.json")
    if (image := vision_cost.cost(config)) is not None:
        _check_vision(bits, file_type)
        return PlannedModel(name, "int8" if bits == 8 else "F32", vision=image)
    wanted = _wanted(_BITS if bits is None and file_type is None else bits, file_type)
    assert wanted is not None
    return PlannedModel(name, wanted, header=retyped(header_of(config), wanted))
