"""Byte-level BPE (GPT-2 and its heirs) as GGUF holds it: texts, types, merges, splitting rule.

Knows what a tokenizer.json says of them; never guesses how it splits.
"""

from __future__ import annotations

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters import pre_tokenizers, tokenizer_files
from edgekit.exporters.tokenizer_files import TokenizerFiles
from edgekit.exporters.tokenizer_types import TokenType, Vocabulary, padded_texts, type_of_added


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
    normalizers = [str(step.get("type")) for step in tokenizer_files.steps(files, "normalizer")]
    steps = tokenizer_files.steps(files, "pre_tokenizer")
    behaviours = [pre_tokenizers.behaviour(step) for step in steps]
    whole_words = bool(model.get("ignore_merges"))
    name = pre_tokenizers.name_of(normalizers, behaviours, whole_words)
    if name is None:
        shown = ", ".join([*normalizers, *behaviours]) or "none"
        raise UnsupportedModelError(f"llama.cpp has no pre-tokenizer like this one: {shown[:300]}")
    return name
