"""The families' own tokenizers, rebuilt from the vocabularies in llama.cpp's source.

EDGEKIT_LLAMA_SOURCE names llama-cpp-python's source package; without it the tests are skipped.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekit.formats import gguf

LLAMA_3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {**WORDS, "use_regex": False}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_PADDING = re.compile(r"\[PAD\d+\]")


def llama_source() -> Path:
    """The llama.cpp source tree that llama-cpp-python's source package carries."""
    root = os.environ.get("EDGEKIT_LLAMA_SOURCE")
    if not root:
        pytest.skip("EDGEKIT_LLAMA_SOURCE does not name llama-cpp-python's source folder")
    return Path(root) / "vendor" / "llama.cpp"


class VocabFile:
    """A vocabulary-only GGUF file of a real model, with the texts and ids that belong to it."""

    def __init__(self, name: str) -> None:
        self._path = llama_source() / "models" / f"ggml-vocab-{name}.gguf"
        metadata = gguf.read(self._path).metadata
        self.tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        self.types: list[int] = metadata["tokenizer.ggml.token_type"]
        self.scores: list[float] | None = metadata.get("tokenizer.ggml.scores")
        self.merges: list[str] | None = metadata.get("tokenizer.ggml.merges")

    @property
    def expected(self) -> list[tuple[str, list[int]]]:
        """(text, ids without special tokens) as llama.cpp's own tests have them."""
        texts = Path(f"{self._path}.inp").read_text(encoding="utf-8")
        ids = Path(f"{self._path}.out").read_text(encoding="utf-8").splitlines()
        pairs = zip(texts.split("\n__ggml_vocab_test__\n"), ids, strict=False)
        return [(text, [int(each) for each in line.split()]) for text, line in pairs]


@functools.cache
def vocab_file(name: str) -> VocabFile:
    """The vocabulary file of one name, read once."""
    return VocabFile(name)


def _added(index: int, text: str, *, special: bool, normalized: bool = False) -> dict[str, Any]:
    return {
        "id": index,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": normalized,
        "special": special,
    }


def _around(bos: str | None, bos_id: int) -> dict[str, Any]:
    """The post-processor that puts ``bos`` before a text."""
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    return {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            *first,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}} if bos else {},
    }


def byte_level(
    vocab: VocabFile,
    steps: list[dict[str, Any]],
    *,
    normalizer: dict[str, Any] | None = None,
    ignore_merges: bool = False,
    more: list[tuple[str, bool]] | None = None,
    post: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A tokenizer.json of byte-level BPE. ``more`` are tokens (text, special) added at the end."""
    added, words = [], {}
    for index, (text, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True)):
        if _PADDING.fullmatch(text):
            continue
        if kind in (_CONTROL, _USER_DEFINED):
            added.append(_added(index, text, special=kind == _CONTROL))
        else:
            words[text] = index
    for index, (text, special) in enumerate(more or [], start=len(vocab.tokens)):
        added.append(_added(index, text, special=special, normalized=not special))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": steps[0]
        if len(steps) == 1
        else {"type": "Sequence", "pretokenizers": steps},
        "post_processor": post or {**WORDS},
        "decoder": {**WORDS},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": words,
            "merges": vocab.merges,
        },
    }


def isolated(pattern: str) -> dict[str, Any]:
    """The step that cuts a text into the matches of ``pattern`` and what lies between."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def sentencepiece_model(vocab: VocabFile, *, add_dummy_prefix: bool = True) -> bytes:
    """A tokenizer.model with the pieces, scores and types of ``vocab``."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    model = pb.ModelProto()
    kinds = {3: pb.ModelProto.SentencePiece.CONTROL, 6: pb.ModelProto.SentencePiece.BYTE}
    for text, score, kind in zip(vocab.tokens, vocab.scores or [], vocab.types, strict=True):
        if _PADDING.fullmatch(text) or (text.startswith("<|") and text != "<|endoftext|>"):
            break
        piece = model.pieces.add()
        piece.piece, piece.score = text, score
        piece.type = kinds.get(kind, pb.ModelProto.SentencePiece.NORMAL)
    for index, text, kind in ((0, "<unk>", 2), (1, "<s>", 3), (2, "</s>", 3)):
        if model.pieces[index].piece == text:
            model.pieces[index].type, model.pieces[index].score = kind, 0.0
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.name = "identity"
    return bytes(model.SerializeToString())


def byte_fallback(
    pieces: list[tuple[str, float, int]],
    added: list[dict[str, Any]],
    *,
    prefix: bool,
    bos: str,
) -> dict[str, Any]:
    """The tokenizer.json that transformers makes of ``pieces`` (text, score, type)."""
    vocab = {text: index for index, (text, _, _) in enumerate(pieces)}
    score = {text: value for text, value, _ in pieces}
    merges = [
        (score[text], cut, len(text) - cut, text)
        for text, _, kind in pieces
        if kind in (_NORMAL, _USER_DEFINED)
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    # The best score first; among equal ones (runs of spaces) the longest left part.
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}
        if prefix
        else replace,
        "pre_tokenizer": None,
        "post_processor": _around(bos, vocab[bos]),
        "decoder": {
            "type": "Sequence",
            "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[text[:cut], text[cut:]] for _, cut, _, text in merges],
        },
    }


def write_json(folder: Path, name: str, value: Any) -> None:
    """One JSON file of a folder."""
    (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"


def _llama_2(folder: Path, *, model_file: bool) -> int:
    """Llama 2's SentencePiece vocabulary, as tokenizer.model too where ``model_file``."""
    vocab = vocab_file("llama-spm")
    pieces = list(zip(vocab.tokens, vocab.scores or [], vocab.types, strict=True))
    added = [_added(i, text, special=True) for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    write_json(folder, "tokenizer.json", byte_fallback(pieces, added, prefix=True, bos="<s>"))
    if model_file:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(vocab))
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": _TEMPLATE,
        "added_tokens_decoder": {str(token.pop("id")): token for token in map(dict, added)},
    }
    write_json(folder, "tokenizer_config.json", config)
    return len(pieces)


def _llama_3(folder: Path) -> int:
    vocab = vocab_file("llama-bpe")
    bos = "<|begin_of_text|>"
    post = {
        "type": "Sequence",
        "processors": [{**WORDS}, _around(bos, vocab.tokens.index(bos))],
    }
    steps = [isolated(LLAMA_3_SPLIT), BYTES]
    write_json(folder, "tokenizer.json", byte_level(vocab, steps, ignore_merges=True, post=post))
    _fast_config(folder, bos_token=bos, eos_token="<|end_of_text|>")
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return len(vocab.tokens)


def _fast_config(folder: Path, **tokens: str) -> None:
    write_json(
        folder,
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **tokens,
        },
    )


def _qwen_2(folder: Path) -> int:
    vocab = vocab_file("qwen2")
    steps = [isolated(QWEN_2_SPLIT), BYTES]
    write_json(folder, "tokenizer.json", byte_level(vocab, steps, normalizer={"type": "NFC"}))
    _fast_config(folder, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    return len(vocab.tokens)


def _gpt_2(folder: Path) -> int:
    vocab = vocab_file("gpt-2")
    write_json(folder, "tokenizer.json", byte_level(vocab, [WORDS]))
    _fast_config(folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return len(vocab.tokens)


def _phi_2(folder: Path) -> int:
    """GPT-2's vocabulary and the runs of blanks that CodeGen added to it."""
    vocab = vocab_file("gpt-2")
    blanks = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    more = [(text, False) for text in blanks]
    write_json(folder, "tokenizer.json", byte_level(vocab, [WORDS], more=more))
    _fast_config(folder, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    return 51200


def _phi_3(folder: Path) -> int:
    vocab = vocab_file("phi-3")
    model = sentencepiece_model(vocab_file("llama-spm"))
    (folder / "tokenizer.model").write_bytes(model)
    llama = vocab_file("llama-spm")
    pieces = list(zip(llama.tokens, llama.scores or [], llama.types, strict=True))
    added = [
        _added(i, text, special=kind == _CONTROL)
        for i, (text, kind) in enumerate(zip(vocab.tokens, vocab.types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED) and not _PADDING.fullmatch(text)
    ]
    write_json(folder, "tokenizer.json", byte_fallback(pieces, added, prefix=True, bos="<s>"))
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": True,
        "add_eos_token": False,
        "chat_template": _TEMPLATE,
        "added_tokens_decoder": {str(token.pop("id")): token for token in map(dict, added)},
    }
    write_json(folder, "tokenizer_config.json", config)
    return len(vocab.tokens)


def _gemma_3(folder: Path) -> int:
    """A small SentencePiece model with the options and special pieces of Gemma's.

    Trained here: the vocabulary of Gemma 3 is in no package.
    """
    import sentencepiece

    model_file = io.BytesIO()
    source = llama_source()
    runs = [mark * count for mark in ("\n", "▁") for count in range(2, 32)]
    defined = [*runs, "<table>", "</table>"]
    lines = (source / "README.md").read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 2),
        model_writer=model_file,
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        character_coverage=0.98,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=defined,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model_file.getvalue())
    model = sentencepiece.SentencePieceProcessor(model_proto=model_file.getvalue())
    size = model.vocab_size()
    pieces, added = [], []
    for index in range(size):
        piece = model.id_to_piece(index)
        control = model.is_control(index) or model.is_unknown(index)
        kind = _CONTROL if control else _BYTE if model.is_byte(index) else _NORMAL
        kind = _USER_DEFINED if piece in defined else kind
        pieces.append((piece, model.get_score(index), kind))
        if kind in (_CONTROL, _USER_DEFINED):
            added.append(_added(index, piece, special=control))
    write_json(folder, "tokenizer.json", byte_fallback(pieces, added, prefix=False, bos="<bos>"))
    config = {
        "tokenizer_class": "GemmaTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(token.pop("id")): token for token in map(dict, added)},
    }
    write_json(folder, "tokenizer_config.json", config)
    return size + 64


TOKENIZERS: dict[str, Callable[[Path], int]] = {
    "llama2": functools.partial(_llama_2, model_file=True),
    "llama2-json": functools.partial(_llama_2, model_file=False),
    "llama3": _llama_3,
    "qwen2": _qwen_2,
    "gpt2": _gpt_2,
    "phi2": _phi_2,
    "phi3": _phi_3,
    "gemma3": _gemma_3,
}
