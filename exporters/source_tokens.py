"""Token ids by the library that a Hugging Face folder's tokenizer was made for.

Must never use edgekit's own reading of a tokenizer: this is the judge that an export is held to.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from edgekit import _proc
from edgekit.formats import json_file
from edgekit.source import ModelSource

_JUDGES = (("tokenizer.json", "tokenizers"), ("tokenizer.model", "sentencepiece"))
_TIMEOUT_S = 300
_MEMORY_BYTES = 8 << 30


def judge(source: ModelSource) -> str | None:
    """``tokenizers 0.23.1``: the installed library that reads this folder; None without one."""
    found = _library(source)
    return f"{found} {metadata.version(found)}" if found else None


def _library(source: ModelSource) -> str | None:
    for name, library in _JUDGES:
        if name in source.files:
            try:
                metadata.version(library)
            except metadata.PackageNotFoundError:
                continue
            return library
    return None


def ids(source: ModelSource, texts: list[str]) -> tuple[str, list[list[int]]]:
    """How the judge treats control tokens written in a text, and the ids of every text.

    "whole": as control tokens, and with what stands around a text. "special": as control tokens.
    "plain": as text. Raises EngineCrashedError, DeadlineError for a file that it cannot read.
    """
    library = _library(source)
    assert library is not None, "ask for a judge first"
    name = next(name for name, each in _JUDGES if each == library)
    way, found = _proc.call(
        f"edgekit.exporters.source_tokens:_{library}",
        {"path": str(source.file_path(name)), "texts": texts},
        timeout_s=_TIMEOUT_S,
        memory_bytes=_MEMORY_BYTES,
        what=f"reading {name} with {library}",
    )
    return way, found


def _tokenizers(path: str, texts: list[str]) -> tuple[str, list[list[int]]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    # Habits of training that a file may have kept.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    body: Any = json_file.read(Path(path), json_file.MAX_BYTES)
    # Without a post-processor it is another file that says what stands around a text.
    whole = bool(body.get("post_processor"))
    found = [tokenizer.encode(text, add_special_tokens=whole).ids for text in texts]
    return ("whole" if whole else "special"), found


def _sentencepiece(path: str, texts: list[str]) -> tuple[str, list[list[int]]]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=path)
    return "plain", [processor.encode(text) for text in texts]
