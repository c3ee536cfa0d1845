"""How byte-level tokenizers split a text before BPE sees it, by the names llama.cpp gives to that.

Knows each rule in the words of tokenizer.json, for both directions; never guesses one, and never
opens a file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


def byte_level(*, words: bool) -> Json:
    """GPT-2's bytes as letters, split into words by its own expression or not."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": words,
    }


def _isolated(pattern: str) -> Json:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


@dataclass(frozen=True)
class Rule:
    """``steps`` split the text; ``nfc`` normalizes it first; ``whole_words`` looks words up before
    merging. ``adds_bos`` is what llama.cpp does where a file with this rule does not say.
    """

    steps: tuple[Json, ...]
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")

_WORDS = (byte_level(words=True),)
_DIGITS = ({"type": "Digits", "individual_digits": True}, *_WORDS)
_AS_LLAMA_3 = (_isolated(_LLAMA_3), byte_level(words=False))
_AS_QWEN_2 = (_isolated(_QWEN_2), byte_level(words=False))

# tokenizer.ggml.pre -> rule. Of names with the same rule, the first is the one that is written.
RULES: dict[str, Rule] = {
    "gpt-2": Rule(_WORDS),
    "phi-2": Rule(_WORDS),
    "smollm": Rule(_DIGITS),
    "refact": Rule(_DIGITS),
    "starcoder": Rule(_DIGITS),
    "llama-bpe": Rule(_AS_LLAMA_3, whole_words=True, adds_bos=True),
    "dbrx": Rule(_AS_LLAMA_3),
    "qwen2": Rule(_AS_QWEN_2, nfc=True),
}


def name_of(normalizers: Iterable[str], behaviours: Iterable[str], whole_words: bool) -> str | None:
    """llama.cpp's name for a rule that was read from a tokenizer, or None where it has none.

    ``normalizers`` are types of steps, ``behaviours`` what ``behaviour`` says of each. The rule
    decides, not the model it came with: another model with the same rule needs no new row.
    """
    wanted = (tuple(normalizers), tuple(behaviours), whole_words)
    return next((name for name, rule in RULES.items() if _read(rule) == wanted), None)


def _read(rule: Rule) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    normalizers = ("NFC",) if rule.nfc else ()
    return normalizers, tuple(map(behaviour, rule.steps)), rule.whole_words


def behaviour(step: Json) -> str:
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
