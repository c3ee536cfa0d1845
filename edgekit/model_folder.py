"""Knows what a Hugging Face folder may hold: which files count, which are refused, which ignored.

Must never load a weight, follow a link, or open a file that could run when it is read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from edgekit import _fs
from edgekit.errors import (
    CorruptArtifactError,
    SourceError,
    UnsafeModelError,
    UnsafePathError,
    UnsupportedModelError,
    VersionError,
)
from edgekit.formats import json_file, onnx, pickle_scan, safetensors
from edgekit.formats.foreign import shown
from edgekit.unsafe_config import refuse_code

_log = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
ONNX = "model.onnx"
WEIGHTS_INDEX = "model.safetensors.index.json"

# What repositories call them; other safetensors there are copies in another layout.
_WEIGHTS_NAME = re.compile(r"model(-\d+-of-\d+)?\.safetensors", re.ASCII)

# Everything beside the weights that is read, if only to refuse the code that it asks for.
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "modules.json",
    "1_Pooling/config.json",
)

_CODE_READERS = (CONFIG, "generation_config.json", "tokenizer_config.json")

PICKLE_HINT = (
    "edgekit never unpickles; load it in a sandbox you can throw away and write safetensors there "
    "(save_pretrained(..., safe_serialization=True)), or take a revision with model.safetensors"
)


@dataclass(frozen=True)
class ModelFolder:
    """A checked folder: the files that decide an export, in a fixed order, and its config."""

    files: tuple[str, ...]
    config: Mapping[str, Any]
    family: str


def wanted(name: str) -> bool:
    """Whether a file of this name in a repository is one that edgekit reads."""
    return name in (*COMPANIONS, WEIGHTS_INDEX) or bool(_WEIGHTS_NAME.fullmatch(name))


def holds_onnx(folder: Path) -> bool:
    """Whether a folder is what optimum-cli makes: an ONNX graph instead of weights."""
    weights = _present(folder, WEIGHTS) or _present(folder, WEIGHTS_INDEX)
    return _present(folder, ONNX) and _present(folder, CONFIG) and not weights


def read(folder: Path) -> ModelFolder:
    """Check ``folder`` and list what counts in it.

    Raises UnsafeModelError for pickled weights, links, unsafe names and configs that ask for code;
    UnsupportedModelError for weights that are already quantized; SourceError for what is missing or
    malformed.
    """
    configs = {
        name: _read_json(_inside(folder, name)) for name in _CODE_READERS if _present(folder, name)
    }
    if CONFIG not in configs:
        raise SourceError(
            f"{folder} has no {CONFIG}", hint="give a Hugging Face folder, a .gguf file or a hub id"
        )
    for name, config in configs.items():
        refuse_code(config, origin=str(folder / name))
    config = configs[CONFIG]
    family = config.get("model_type")
    if not isinstance(family, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", family):
        raise SourceError(f"{folder / CONFIG} names no model_type")
    weights = _graph(folder) if holds_onnx(folder) else _weights(folder)
    _refuse_quantized(folder, config)
    _name_ignored(folder)
    companions = [name for name in COMPANIONS if _present(folder, name)]
    for name in companions:
        _inside(folder, name)
    return ModelFolder((*companions, *weights), config, family)


def _present(folder: Path, name: str) -> bool:
    path = folder / name
    return path.is_symlink() or path.exists()


def safe_path(folder: Path, name: str) -> Path:
    """The path of ``name`` in ``folder``, whether it exists or not; UnsafeModelError for a link and
    for a name that leaves the folder.
    """
    try:
        return _fs.contained(folder, name)
    except UnsafePathError as error:
        raise UnsafeModelError(
            f"{folder}: {error.message}", hint="copy the folder with `cp -rL` to get plain files"
        ) from None


def _inside(folder: Path, name: str) -> Path:
    path = safe_path(folder, name)
    if not path.is_file():
        raise SourceError(f"{path} is missing or not a file", hint="download the model again")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    value = json_file.read(path)
    if not isinstance(value, dict):
        raise SourceError(f"{path} is not a JSON object", hint="download the model again")
    return value


def _graph(folder: Path) -> tuple[str, ...]:
    """The names of the graph's file and of those beside it that hold its weights."""
    path = _inside(folder, ONNX)
    with as_source(path):
        header = onnx.read(path)
    beside = sorted({tensor.external for tensor in header.initializers if tensor.external})
    return (ONNX, *beside)


def _weights(folder: Path) -> tuple[str, ...]:
    """The names of all weight files, index first; their headers are in order."""
    if _present(folder, WEIGHTS_INDEX):
        path = _inside(folder, WEIGHTS_INDEX)
        with as_source(path):
            shards = tuple(sorted(set(safetensors.read_index(path).values())))
        names: tuple[str, ...] = (WEIGHTS_INDEX, *shards)
    elif _present(folder, WEIGHTS):
        shards = names = (WEIGHTS,)
    else:
        refuse_without_weights(str(folder), [path.name for path in folder.iterdir()])
    for name in shards:
        path = _inside(folder, name)
        with as_source(path):
            safetensors.read(path)
    return names


@contextmanager
def as_source(path: Path) -> Iterator[None]:
    """As a source a broken file is a bad source, whatever it would be inside an artifact."""
    try:
        yield
    except UnsafePathError as error:
        raise UnsafeModelError(error.message, hint=error.hint) from None
    except (CorruptArtifactError, VersionError) as error:
        if pickle_scan.begins_like_pickle(path):
            raise UnsafeModelError(
                f"{path} is a pickle under another name", hint=PICKLE_HINT
            ) from None
        raise SourceError(error.message, hint=error.hint) from None


def refuse_pickles(origin: str, names: Iterable[str]) -> None:
    """Raise UnsafeModelError if a file's name says that it is a pickle."""
    if pickles := sorted(name for name in names if pickle_scan.named_like_pickle(name)):
        raise UnsafeModelError(
            f"{origin} has its weights only as a pickle ({shown(pickles[0])})", hint=PICKLE_HINT
        )


def refuse_without_weights(origin: str, names: Iterable[str]) -> NoReturn:
    """Say why a folder or repository without safetensors weights is of no use."""
    names = sorted(names)
    refuse_pickles(origin, names)
    if files := [name for name in names if name.endswith(".gguf")]:
        raise SourceError(
            f"{origin} holds GGUF files and no {WEIGHTS}",
            hint=f"give one of the files itself, such as {shown(files[0])}",
        )
    raise SourceError(f"{origin} has no {WEIGHTS}", hint="download the model again")


def _refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    for key in ("quantization_config", "compression_config"):
        if settings := config.get(key):
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise UnsupportedModelError(
                f"{folder} holds weights that are already quantized ({shown(str(method))})",
                hint="start from the float model that it was made of",
            )


def _name_ignored(folder: Path) -> None:
    """Say which files could run if somebody opened them; edgekit does not."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py" or pickle_scan.named_like_pickle(path.name):
            _log.info("ignored, never opened: %s", path)
