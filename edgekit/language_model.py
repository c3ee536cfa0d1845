"""What a language model in ONNX form needs beside its graph: vocabulary, ends, chat template.

Knows the fields of ``language_model.json``, and whether a model file has one; computes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from edgekit import typed_json
from edgekit.errors import CorruptArtifactError, SourceError
from edgekit.formats import foreign, json_file

FILE = "language_model.json"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
_MAX_BYTES = 4 << 20
_MAX_LAYERS, _MAX_SIZE = 4096, 1 << 24


@dataclass(frozen=True)
class Turning:
    """Rotary positions of some layers: value i of a head turns with value i + head / 2, by
    ``frequencies[i]`` a position. What moves cells of the cache to other positions needs it.
    """

    layers: tuple[int, ...]
    frequencies: tuple[float, ...]


@dataclass(frozen=True)
class LanguageModel:
    """``bos`` begins a text (None: nothing does), and is put there where ``adds_bos``; each of
    ``ends`` ends an answer, ``eos`` is the one that templates write. ``type`` is that of the
    matrices, for people.
    """

    family: str
    type: str
    context_length: int
    vocab_size: int
    width: int
    layers: int
    kv_heads: int
    head_dim: int
    bos: int | None
    adds_bos: bool
    eos: int | None
    ends: tuple[int, ...]
    turning: tuple[Turning, ...]

    def to_bytes(self) -> bytes:
        """The JSON of ``language_model.json``; ``read`` gives an equal object back."""
        return (json.dumps(typed_json.write(self), indent=1, ensure_ascii=False) + "\n").encode()


def read(path: Path) -> LanguageModel:
    """Raises CorruptArtifactError for anything but such a file with sane numbers."""
    try:
        found = typed_json.read(LanguageModel, json_file.read(path, _MAX_BYTES), path.name)
        _check(found)
    except (typed_json.Mismatch, SourceError) as error:
        raise CorruptArtifactError(str(error), hint="export the model again") from None
    return found


def is_one(model: Path) -> bool:
    """Whether the ONNX file ``model`` is a language model: its folder says so."""
    return (model.parent / FILE).is_file()


def beside(model: Path) -> LanguageModel:
    """That of the model file's folder. Raises CorruptArtifactError."""
    return read(model.parent / FILE)


def chat_template(model: Path) -> str | None:
    """The chat template beside a model file, None without one. Raises CorruptArtifactError."""
    path = model.parent / TEMPLATE
    if not path.is_file():
        return None
    try:
        return foreign.read_whole(path, _MAX_BYTES).decode("utf-8")
    except (SourceError, UnicodeDecodeError):
        raise CorruptArtifactError(f"{path} is no text", hint="export the model again") from None


def _check(found: LanguageModel) -> None:
    def expect(good: bool, what: str) -> None:
        if not good:
            raise typed_json.Mismatch(FILE, f": {what}")

    expect(0 < found.layers <= _MAX_LAYERS, f"{found.layers} layers")
    for name in ("context_length", "vocab_size", "width", "kv_heads", "head_dim"):
        value = getattr(found, name)
        expect(0 < value <= _MAX_SIZE, f"{name} is {value}")
    tokens = [*found.ends, *(id for id in (found.bos, found.eos) if id is not None)]
    expect(all(0 <= token < found.vocab_size for token in tokens), "a token beyond the vocabulary")
    expect(found.bos is not None or not found.adds_bos, "it begins texts with no token")
    turned = sorted(layer for each in found.turning for layer in each.layers)
    expect(turned == list(range(found.layers)), "the layers that turn are not all layers, once")
    for each in found.turning:
        half = len(each.frequencies)
        expect(2 * half == found.head_dim, f"{half} frequencies for a head of {found.head_dim}")
