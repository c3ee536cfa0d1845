"""Rebuilds tokenizer.json and its companions from the vocabulary inside a GGUF file.

Knows what llama.cpp leaves unsaid about a vocabulary; never guesses how it splits text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters.pre_tokenizers import RULES, Json, byte_level
from edgekit.exporters.tokenizer_types import TokenType
from edgekit.formats.foreign import shown
from edgekit.formats.gguf import GgufHeader
from edgekit.registry import did_you_mean

_PREFIX = "tokenizer.ggml."
_SPACE = "▁"
_NO_TOKEN = 0xFFFFFFFF
_MAX_PIECE_CHARS = 256


class GgufTokenizer:
    """The tokenizer of a GGUF file.

    Raises UnsupportedModelError for a kind or a splitting rule that is not known, SourceError for
    a vocabulary that contradicts itself.
    """

    def __init__(self, header: GgufHeader) -> None:
        self._metadata = header.metadata
        self._family = header.architecture
        self._kind = str(self._get("model", ""))
        if self._kind not in ("gpt2", "llama"):
            raise UnsupportedModelError(
                f"tokenizers of the kind {shown(self._kind)} cannot be rebuilt",
                hint="known: gpt2 (byte-level BPE), llama (SentencePiece)",
            )
        self._tokens = [_text(token) for token in self._get("tokens", [])]
        types = self._get("token_type", [TokenType.NORMAL] * len(self._tokens))
        if not self._tokens or not all(kind in TokenType.__members__.values() for kind in types):
            raise SourceError("the GGUF file's vocabulary is empty or has unknown token types")
        self._types = [TokenType(kind) for kind in types]

    def _get(self, key: str, default: Any) -> Any:
        return self._metadata.get(_PREFIX + key, default)

    def special(self, name: str) -> int | None:
        """The id of "bos", "eos", "unknown", "padding" or "eot"; None where there is none."""
        found = self._get(f"{name}_token_id", None)
        if found is None or found in (-1, _NO_TOKEN) or found >= len(self._tokens):
            return None
        return int(found)

    @property
    def end_ids(self) -> list[int]:
        """Every token that ends an answer."""
        ids = [self.special("eos"), self.special("eot")]
        return list(dict.fromkeys(each for each in ids if each is not None))

    def tokenizer_json(self) -> Json:
        """tokenizer.json, in the form of the tokenizers library's version 1.0."""
        body = self._byte_level() if self._kind == "gpt2" else self._sentence_piece()
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added()),
            **body,
        }

    def tokenizer_config(self, context_length: int) -> Json:
        """tokenizer_config.json for transformers 4 and 5: both know this class by this name."""
        config: Json = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context_length,
            "clean_up_tokenization_spaces": False,
        }
        for key, name in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ):
            if (index := self.special(name)) is not None:
                config[key] = self._tokens[index]
        template = self._metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            config["chat_template"] = template
        return config

    def _adds(self, name: str, default: bool) -> int | None:
        return self.special(name) if self._get(f"add_{name}_token", default) else None

    def _added(self) -> Iterator[Json]:
        """Tokens that are cut out of a text before anything else happens to it."""
        for index, kind in enumerate(self._types):
            if kind is TokenType.USER_DEFINED or self._is_special(index):
                text = self._tokens[index]
                yield {
                    "id": index,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": self._strips_right(text, kind),
                    "normalized": False,
                    "special": self._is_special(index),
                }

    def _is_special(self, index: int) -> bool:
        kind = self._types[index]
        return kind is TokenType.CONTROL or (kind is TokenType.UNKNOWN and self._kind == "llama")

    def _strips_right(self, text: str, kind: TokenType) -> bool:
        """Phi-3's tokens swallow the space behind them; no GGUF file says so, llama.cpp knows it
        by the name of the family (src/llama-vocab.cpp).
        """
        kept = ("<unk>", "<s>", "<|endoftext|>")
        return self._family == "phi3" and text not in kept and kind is not TokenType.NORMAL

    def _vocabulary(self) -> dict[str, int]:
        """Text -> id. Unused ids have invented texts, which no text may ever turn into."""
        vocabulary = {
            text: index
            for index, text in enumerate(self._tokens)
            if self._types[index] is not TokenType.UNUSED
        }
        if len(vocabulary) != sum(kind is not TokenType.UNUSED for kind in self._types):
            raise SourceError("the GGUF file's vocabulary has a text twice")
        return vocabulary

    def _byte_level(self) -> Json:
        name = str(self._get("pre", "default"))
        rule = RULES.get(name)
        if rule is None:
            raise UnsupportedModelError(
                f"the pre-tokenizer {shown(name)} cannot be rebuilt",
                hint=did_you_mean(name, list(RULES)),
            )
        steps = list(rule.steps)
        return {
            "normalizer": {"type": "NFC"} if rule.nfc else None,
            "pre_tokenizer": (
                {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
            ),
            "post_processor": self._template(
                bos=self._adds("bos", rule.adds_bos), eos=self._adds("eos", False)
            ),
            "decoder": byte_level(words=True),
            "model": _bpe(self._vocabulary(), self._merges(), ignore_merges=rule.whole_words),
        }

    def _merges(self) -> list[tuple[str, str]]:
        merges = []
        for merge in self._get("merges", []):
            # A space ends the left part, but for the one it may begin with.
            left, _, right = _text(merge).partition(" ")
            if not left or not right:
                raise SourceError(f"the GGUF file has the malformed merge {shown(merge)}")
            merges.append((left, right))
        return merges

    def _sentence_piece(self) -> Json:
        prefix = bool(self._get("add_space_prefix", True))
        steps: list[Json] = [
            {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        ]
        decoders: list[Json] = [
            {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            steps.insert(0, {"type": "Prepend", "prepend": _SPACE})
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        unknown = self.special("unknown")
        return {
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": None,
            "post_processor": self._template(
                bos=self._adds("bos", True), eos=self._adds("eos", False)
            ),
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": _bpe(
                self._vocabulary(),
                self._merges_by_score(),
                unk_token=None if unknown is None else self._tokens[unknown],
                fuse_unk=True,
                byte_fallback=TokenType.BYTE in self._types,
            ),
        }

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """SentencePiece joins the two neighbours whose union scores best; so each way to cut a
        piece in two is a merge, and the better the piece's score, the earlier the merge.
        """
        scores = self._get("scores", None)
        if scores is None:
            raise SourceError("the GGUF file's SentencePiece vocabulary has no scores")
        pieces = {
            text: index
            for index, text in enumerate(self._tokens)
            if self._types[index] in (TokenType.NORMAL, TokenType.USER_DEFINED)
        }
        found: list[tuple[float, int, int, str, str]] = []
        for text, index in pieces.items():
            if len(text) > _MAX_PIECE_CHARS:
                raise SourceError(f"the GGUF file has the overlong token {shown(text)}")
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in pieces and right in pieces:
                    found.append((-scores[index], pieces[left], pieces[right], left, right))
        found.sort()
        return [(left, right) for *_, left, right in found]

    def _template(self, *, bos: int | None, eos: int | None) -> Json | None:
        """What is put around a text when special tokens are asked for."""
        if bos is None and eos is None:
            return byte_level(words=True) if self._kind == "gpt2" else None

        def around(letter: str, segment: int) -> list[Json]:
            parts: list[Json] = [{"Sequence": {"id": letter, "type_id": segment}}]
            if bos is not None:
                parts.insert(0, {"SpecialToken": {"id": self._tokens[bos], "type_id": segment}})
            if eos is not None:
                parts.append({"SpecialToken": {"id": self._tokens[eos], "type_id": segment}})
            return parts

        return {
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": around("A", 0) + around("B", 1),
            "special_tokens": {
                self._tokens[index]: {
                    "id": self._tokens[index],
                    "ids": [index],
                    "tokens": [self._tokens[index]],
                }
                for index in (bos, eos)
                if index is not None
            },
        }


def _text(token: str) -> str:
    try:
        token.encode()
    except UnicodeEncodeError:
        raise SourceError(f"the GGUF file has the token {shown(token)}, not UTF-8") from None
    return token


def _bpe(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], **settings: Any) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **settings,
        "vocab": dict(vocabulary),
        "merges": merges,
    }
