"""Byte-level BPE (GPT-2 and its heirs) as GGUF holds it: texts, types, merges, splitting rule.

Knows which splitting rules llama.cpp has and what it calls them; never guesses one.
"""

from __future__ import annotations

from typing import Any

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters import tokenizer_files
from edgekit.exporters.tokenizer_files import TokenizerFiles
from edgekit.exporters.tokenizer_types import TokenType, Vocabulary, padded_texts, type_of_added

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")

# (normalizers, splitting steps, whole words first) -> llama.cpp's name for that behaviour. The
# rule is read from the tokenizer itself, so another model with the same rule needs no new row.
_NAMES: dict[tuple[tuple[str, ...], tuple[str, ...], bool], str] = {
    ((), ("words",), False): "gpt-2",
    ((), ("digits", "words"), False): "smollm",
    ((), (f"isolated {_LLAMA_3}", "bytes"), True): "llama-bpe",
    ((), (f"isolated {_LLAMA_3}", "bytes"), False): "dbrx",
    (("NFC",), (f"isolated {_QWEN_2}", "bytes"), False): "qwen2",
}


def vocabulary(files: TokenizerFiles, vocab_size: int) -> Vocabulary:
    """The vocabulary of tokenizer.json, padded with unused tokens to ``vocab_size``.

    Raises UnsupportedModelError for a splitting rule that llama.cpp has no name for, SourceError
    for a vocabulary with holes that overlap or ids beyond ``vocab_size``.
    """
    name = pre_tokenizer(files)
    texts = padded_texts(files, vocab_size)
    types = [TokenType.NORMAL if text is not None else TokenType.UNUSED for text in texts]
    tokens = [f"[PAD{i}]" if text is None else text for i, text in enumerate(texts)]
    for added in files.added:
        types[added.id] = type_of_added(added)
    merges = []
    for left, right in files.merges:
        if " " in left or " " in right:
            raise SourceError(f"tokenizer.json has a merge with a space in it: {left + right!r}")
        merges.append(f"{left} {right}")
    return Vocabulary("gpt2", name, tokens, types, merges=merges)


def pre_tokenizer(files: TokenizerFiles) -> str:
    """llama.cpp's name for how this tokenizer splits a text before BPE sees it.

    Raises UnsupportedModelError, which names the step that is not known.
    """
    model = files.model
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedModelError(f"BPE tokenizers with {key}={model[key]!r}")
    normalizers = tuple(
        str(step.get("type")) for step in tokenizer_files.steps(files, "normalizer")
    )
    steps = tuple(_behaviour(step) for step in tokenizer_files.steps(files, "pre_tokenizer"))
    name = _NAMES.get((normalizers, steps, bool(model.get("ignore_merges"))))
    if name is None:
        shown = ", ".join([*normalizers, *steps]) or "none"
        raise UnsupportedModelError(f"llama.cpp has no pre-tokenizer like this one: {shown[:300]}")
    return name


def _behaviour(step: dict[str, Any]) -> str:
    """What a splitting step does, in one phrase; its type alone where that says nothing certain."""
    kind = str(step.get("type"))
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return "words" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern = step.get("pattern")
        if isinstance(pattern, dict) and isinstance(pattern.get("Regex"), str):
            return f"isolated {pattern['Regex']}"
    return f"{kind} {sorted((k, str(v)) for k, v in step.items() if k != 'type')}"
