"""Writes the tokenizer of a Hugging Face folder into the metadata of a GGUF file.

Knows which of llama.cpp's two kinds of vocabulary a folder has; never knows a model's tensors.
"""

from __future__ import annotations

from typing import Any

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters import tokenizer_bpe, tokenizer_spm
from edgekit.exporters.arch.family import Family
from edgekit.exporters.tokenizer_files import TokenizerFiles
from edgekit.exporters.tokenizer_types import Vocabulary
from edgekit.formats import gguf_vocab, sentencepiece
from edgekit.formats.foreign import Malformed
from edgekit.model_folder import as_source
from edgekit.source import ModelSource

_MODEL_NAME = "tokenizer.model"
_ROLE_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # the spelling of the format
    "pad": "padding_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}


def add(writer: Any, source: ModelSource, family: Family) -> None:
    """Add every ``tokenizer.*`` key to ``writer`` (a gguf.GGUFWriter).

    Raises SourceError for a folder without a tokenizer, UnsupportedModelError for one that
    llama.cpp would not follow exactly.
    """
    files = TokenizerFiles(source)
    vocabulary = _vocabulary(files, source, family.vocab_size)
    _check_usable(vocabulary)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(family.pre_names.get(vocabulary.pre, vocabulary.pre))
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for role, index in files.special_ids(family.vocab_size).items():
        writer.add_uint32(f"tokenizer.ggml.{_ROLE_KEYS[role]}", index)
    fixed = {
        **{f"tokenizer.ggml.add_{role}_token": on for role, on in files.ends_added().items()},
        **family.tokenizer_metadata(),
    }
    if vocabulary.space_prefix is not None:
        fixed["tokenizer.ggml.add_space_prefix"] = vocabulary.space_prefix
    for key, value in fixed.items():
        writer.add_bool(key, value)
    _add_templates(writer, files.chat_templates())


def _check_usable(vocabulary: Vocabulary) -> None:
    """Refuse now what our own reader would refuse in the finished file."""
    texts = {"tokenizer.ggml.model": vocabulary.model, "tokenizer.ggml.tokens": vocabulary.tokens}
    try:
        gguf_vocab.check(texts, {})
    except Malformed as error:
        raise UnsupportedModelError(f"the tokenizer {error}") from None


def _add_templates(writer: Any, templates: dict[str, str]) -> None:
    """Not by the writer's own call: it lists the names in the order of a set, new in every run."""
    others = {
        "".join(c if c.isascii() and c.isalnum() else "_" for c in name): template
        for name, template in sorted(templates.items())
        if name != "default"
    }
    for name, template in others.items():
        writer.add_string(f"tokenizer.chat_template.{name}", template)
    if others:
        writer.add_array("tokenizer.chat_templates", list(others))
    if "default" in templates:
        writer.add_string("tokenizer.chat_template", templates["default"])


def _vocabulary(files: TokenizerFiles, source: ModelSource, vocab_size: int) -> Vocabulary:
    if files.has(_MODEL_NAME):
        path = source.file_path(_MODEL_NAME)
        with as_source(path):
            model = sentencepiece.read(path)
        return tokenizer_spm.from_model(model, files, vocab_size)
    if not files.json:
        raise SourceError(
            f"{source.path} has neither tokenizer.json nor {_MODEL_NAME}",
            hint="save the tokenizer beside the model with save_pretrained",
        )
    if files.model.get("type") == "BPE" and files.model.get("byte_fallback"):
        return tokenizer_spm.from_merges(files, vocab_size)
    return tokenizer_bpe.vocabulary(files, vocab_size)
