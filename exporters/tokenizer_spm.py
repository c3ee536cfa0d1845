"""SentencePiece vocabularies as GGUF holds them: pieces with scores.

Knows tokenizer.model, and the byte-fallback BPE that tokenizer.json makes of one; never runs
either.
"""

from __future__ import annotations

import re
from typing import Any

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters import tokenizer_files
from edgekit.exporters.tokenizer_files import TokenizerFiles
from edgekit.exporters.tokenizer_types import TokenType, Vocabulary, padded_texts, type_of_added
from edgekit.formats.sentencepiece import SentencePieceModel

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
_ADDED_SCORE = -1000.0
_UNUSED_SCORE = -10000.0


def from_model(model: SentencePieceModel, files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """The vocabulary of a tokenizer.model and the tokens added to it later.

    Raises UnsupportedModelError for models that llama.cpp would split differently: unigram ones,
    and ones that rewrite the text first.
    """
    if model.model_type != "bpe":
        raise UnsupportedModelError(f"SentencePiece '{model.model_type}' models have no GGUF form")
    if model.precompiled_charsmap or model.remove_extra_whitespaces:
        raise UnsupportedModelError("a SentencePiece model that rewrites the text has no GGUF form")
    if len(model.pieces) > vocab_size:
        raise SourceError(
            f"tokenizer.model has {len(model.pieces)} pieces, but vocab_size is {vocab_size}"
        )
    vocabulary = _unused(vocab_size)
    for index, (text, score, kind) in enumerate(model.pieces):
        _set(vocabulary, index, text, score, TokenType(kind))
    _set_added(vocabulary, files)
    return _with_prefix(vocabulary, files, model.add_dummy_prefix)


def from_merges(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """The vocabulary of a tokenizer.json that was made from a SentencePiece model.

    llama.cpp joins the two neighbours whose union has the best score, tokenizer.json the two whose
    merge comes first. Both do the same when the score of a piece is minus the place of its first
    merge, and no join is possible that is no merge: this is checked.
    Raises UnsupportedModelError where it does not hold.
    """
    if files.model.get("ignore_merges") or files.model.get("dropout"):
        raise UnsupportedModelError("byte-fallback BPE with ignore_merges or dropout")
    places = _places(files)
    vocabulary = _unused(vocab_size)
    unknown = files.model.get("unk_token")
    for index, text in enumerate(padded_texts(files, vocab_size)):
        if text is None:
            continue
        kind = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        score = float(-places.get(text, 0))
        _set(vocabulary, index, text, score, TokenType.UNKNOWN if text == unknown else kind)
    _set_added(vocabulary, files)
    return _with_prefix(vocabulary, files, None)


def _places(files: TokenizerFiles) -> dict[str, int]:
    """Piece -> place among all pieces, by their first merge."""
    vocabulary = files.vocabulary
    places: dict[str, int] = {}
    last = ""
    for left, right in files.merges:
        piece = left + right
        if piece not in vocabulary:
            raise SourceError(f"tokenizer.json merges into {piece!r}, which is no token")
        # Runs of one character are the exception: SentencePiece gives them all the same score.
        if piece != last and piece in places and len(set(piece)) > 1:
            raise UnsupportedModelError(f"the merges of {piece!r} have no single score")
        places.setdefault(piece, len(places))
        last = piece
    merges = set(files.merges)
    added = {token.text for token in files.added}
    for piece in vocabulary:
        if piece in added or _BYTE.fullmatch(piece):
            continue
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in merges:
                raise UnsupportedModelError(
                    f"llama.cpp would join {pair[0]!r} and {pair[1]!r}, this tokenizer does not"
                )
    return places


def _unused(vocab_size: int) -> Vocabulary:
    return Vocabulary(
        "llama",
        "default",
        [f"[PAD{index}]" for index in range(vocab_size)],
        [TokenType.UNUSED] * vocab_size,
        scores=[_UNUSED_SCORE] * vocab_size,
    )


def _set(vocabulary: Vocabulary, index: int, text: str, score: float, kind: TokenType) -> None:
    assert vocabulary.scores is not None
    vocabulary.tokens[index] = text
    vocabulary.scores[index] = score
    vocabulary.types[index] = kind


def _set_added(vocabulary: Vocabulary, files: TokenizerFiles) -> None:
    for token in files.added:
        if token.id >= len(vocabulary.tokens):
            raise SourceError(
                f"token {token.text!r} has id {token.id}, but there are {len(vocabulary.tokens)}"
            )
        kind = type_of_added(token)
        # llama.cpp looks for these in the text as it came, where a space is still a space.
        plain = kind is TokenType.USER_DEFINED
        text = token.text.replace(_SPACE, " ") if plain else token.text
        _set(vocabulary, token.id, text, _ADDED_SCORE, kind)


def _with_prefix(
    vocabulary: Vocabulary, files: TokenizerFiles, of_model: bool | None
) -> Vocabulary:
    """The vocabulary, with what its files say about a space before the text."""
    prefix = _prefix_of_json(files) if files.json else of_model
    stated = files.config.get("add_prefix_space")
    return Vocabulary(
        vocabulary.model,
        vocabulary.pre,
        vocabulary.tokens,
        vocabulary.types,
        scores=vocabulary.scores,
        space_prefix=stated if isinstance(stated, bool) else bool(prefix),
    )


def _prefix_of_json(files: TokenizerFiles) -> bool:
    """Whether a space goes before the text; UnsupportedModelError for any other edit."""
    prefix = False
    normalizers = tokenizer_files.steps(files, "normalizer")
    for step in normalizers + tokenizer_files.steps(files, "pre_tokenizer"):
        match step:
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case {"type": "Metaspace", "replacement": "▁", "split": False}:
                prefix = step.get("prepend_scheme") != "never"
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            # Splits at spaces, of which the Replace above has left none.
            case {"type": "Split", "pattern": {"String": " "}} if normalizers:
                pass
            case _:
                raise UnsupportedModelError(f"tokenizer step {_shown(step)} has no GGUF form")
    return prefix


def _shown(step: dict[str, Any]) -> str:
    return ascii(step)[:100]
