"""The tokenizer files of a Hugging Face folder as plain data: vocabulary, special tokens, template.

Knows what the files say; never knows how a text is split into tokens, nor GGUF.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.formats import foreign, json_file
from edgekit.source import ModelSource

_MAX_CONFIG_BYTES = 16 << 20
_MAX_TEMPLATE_BYTES = 1 << 20
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of a text before anything else looks at it."""

    id: int
    text: str
    special: bool


class TokenizerFiles:
    """Lazy views on tokenizer.json, tokenizer_config.json and their neighbours.

    Every property raises SourceError for a file that is not what its name promises.
    """

    def __init__(self, source: ModelSource) -> None:
        self._source = source

    def has(self, name: str) -> bool:
        """Whether the folder holds ``name``."""
        return name in self._source.files

    @cached_property
    def json(self) -> dict[str, Any]:
        """tokenizer.json; empty when there is none."""
        return self._mapping("tokenizer.json", json_file.MAX_BYTES)

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json; empty when there is none."""
        return self._mapping("tokenizer_config.json", _MAX_CONFIG_BYTES)

    def _template(self, name: str) -> str:
        path = self._source.file_path(name)
        try:
            return foreign.read_whole(path, _MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise SourceError(f"{name} is not UTF-8 text") from None

    def _mapping(self, name: str, max_bytes: int) -> dict[str, Any]:
        if not self.has(name):
            return {}
        value = json_file.read(self._source.file_path(name), max_bytes)
        if not isinstance(value, dict):
            raise SourceError(f"{name} must hold a mapping")
        return value

    @cached_property
    def model(self) -> dict[str, Any]:
        """The "model" part of tokenizer.json."""
        return _part(self.json, "model")

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token text -> id, without tokens that only ``added`` has."""
        vocabulary = self.model.get("vocab")
        if not isinstance(vocabulary, dict) or not all(
            isinstance(index, int) for index in vocabulary.values()
        ):
            raise SourceError("tokenizer.json has no vocabulary of token texts and ids")
        return vocabulary

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs of byte-pair encoding in their order, from either way to write them."""
        merges = self.model.get("merges")
        if not isinstance(merges, list) or not merges:
            raise SourceError("tokenizer.json has no merges")
        pairs = []
        for merge in merges:
            pair = merge.split(" ") if isinstance(merge, str) else merge
            if (
                not isinstance(pair, list)
                or len(pair) != 2
                or not all(isinstance(part, str) for part in pair)
            ):
                raise SourceError(
                    f"tokenizer.json has a merge that is no pair: {str(merge)[:40]!r}"
                )
            pairs.append((pair[0], pair[1]))
        return pairs

    @cached_property
    def added(self) -> list[AddedToken]:
        """The added tokens of tokenizer.json, or else of the files that older models have."""
        if self.json:
            entries = self.json.get("added_tokens") or []
            if not isinstance(entries, list):
                raise SourceError("tokenizer.json: added_tokens must be a list")
        else:
            older = _part(self.config, "added_tokens_decoder")
            entries = [{"id": _whole(key), **_mapping(value)} for key, value in older.items()]
            known = {entry["id"] for entry in entries}
            oldest = self._mapping("added_tokens.json", _MAX_CONFIG_BYTES)
            entries += [
                {"id": index, "content": text, "special": False}
                for text, index in oldest.items()
                if index not in known
            ]
        found = []
        for entry in entries:
            index, text = _mapping(entry).get("id"), _mapping(entry).get("content")
            if not isinstance(index, int) or index < 0 or not isinstance(text, str):
                raise SourceError("an added token has no id or no text")
            found.append(AddedToken(index, text, bool(entry.get("special"))))
        return found

    def special_ids(self, vocab_size: int) -> dict[str, int]:
        """Role ("bos", "eos", "unk", "sep", "pad", "cls", "mask") -> token id.

        tokenizer_config.json names a token's text, and config.json an id for roles it leaves open.
        """
        by_text = {token.text: token.id for token in self.added}
        found: dict[str, int] = {}
        for role in _ROLES:
            index = by_text.get(self.token_text(role) or "")
            if index is None:
                index = self._source.config.get(f"{role}_token_id")
            if isinstance(index, int) and 0 <= index < vocab_size:
                found[role] = index
        return found

    def token_text(self, role: str) -> str | None:
        """The text of a role in tokenizer_config.json, written plainly or as a token object."""
        token = self.config.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        return text if isinstance(text, str) else None

    def ends_added(self) -> dict[str, bool]:
        """Whether "bos" and "eos" are put around every text; a role is absent where no file says.

        Raises UnsupportedModelError where the tokenizer adds something else: llama.cpp cannot.
        """
        found: dict[str, bool] = {}
        for step in _steps(self.json.get("post_processor"), "processors"):
            if step.get("type") == "ByteLevel":
                found = {"bos": False, "eos": False, **found}
            elif step.get("type") == "TemplateProcessing":
                found |= self._around_text(step)
            else:
                raise UnsupportedModelError(f"tokenizer post-processor '{step.get('type')}'")
        for role in ("bos", "eos"):
            wanted = self.config.get(f"add_{role}_token")
            if isinstance(wanted, bool):
                found.setdefault(role, wanted)
        return found

    def _around_text(self, template: dict[str, Any]) -> dict[str, bool]:
        """What a template for one text says: ``[bos] text [eos]``, each end optional."""
        parts = template.get("single")
        names: list[Any] = []  # None stands for the text itself
        for part in parts if isinstance(parts, list) else []:
            special = _mapping(part).get("SpecialToken")
            names.append(_mapping(special).get("id") if special else None)
        if names.count(None) != 1 or len(names) > 3:
            raise UnsupportedModelError("the tokenizer's template is not '[bos] text [eos]'")
        at = names.index(None)
        before, after = names[:at], names[at + 1 :]
        found = {}
        for role, texts in (("bos", before), ("eos", after)):
            if len(texts) > 1 or (texts and texts[0] != self.token_text(role)):
                raise UnsupportedModelError(
                    f"the tokenizer adds '{texts[0]}', which is not its {role} token"
                )
            if texts:
                found[role] = True
        return found

    def chat_templates(self) -> dict[str, str]:
        """Name -> Jinja text; the main one is called "default". Empty when there is none."""
        if self.has("chat_template.jinja"):
            return {"default": self._template("chat_template.jinja")}
        template = self.config.get("chat_template")
        if template is None:
            template = self._mapping("chat_template.json", _MAX_TEMPLATE_BYTES).get("chat_template")
        if isinstance(template, str):
            return {"default": template}
        if not isinstance(template, list):
            return {}
        return {str(_mapping(e).get("name")): str(_mapping(e).get("template")) for e in template}


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SourceError("the tokenizer files hold something else than a mapping")
    return value


def _part(whole: dict[str, Any], key: str) -> dict[str, Any]:
    return _mapping(whole.get(key) or {})


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise SourceError(f"tokenizer_config.json: {text[:20]!r} is no token id")
    return int(text)


def _steps(component: Any, plural: str) -> list[dict[str, Any]]:
    """The steps of a component of tokenizer.json, whether it is one step or a Sequence of them."""
    if component is None:
        return []
    step = _mapping(component)
    if step.get("type") != "Sequence":
        return [step]
    inner = step.get(plural)
    if not isinstance(inner, list):
        raise SourceError(f"tokenizer.json: a Sequence without {plural}")
    return [found for each in inner for found in _steps(each, plural)]


def steps(files: TokenizerFiles, component: str) -> list[dict[str, Any]]:
    """The steps of "normalizer" or "pre_tokenizer" in order."""
    plural = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[component]
    return _steps(files.json.get(component), plural)
