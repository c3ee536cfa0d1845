"""From messages to a prompt's tokens, through the model's own chat template.

Must never run a template in this process (``template_worker`` does), nor trust a message's text.
What a user writes is text, even where it looks like a control token: see ``Guard``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import Any

from edgekit import _proc
from edgekit.errors import (
    MissingExtraError,
    UnsafeModelError,
    UnsupportedModelError,
    UsageError,
)
from edgekit.runtimes import template_worker

ROLES = ("system", "developer", "user", "assistant", "tool")
_START_TIMEOUT_S = 30.0
# Unicode noncharacters: no text needs them, no tokenizer knows them, no filter of jinja2 eats them.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def check_messages(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """A copy of ``messages`` if each is a known role and a text, else UsageError."""
    if not messages:
        raise UsageError("a chat needs at least one message")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise UsageError('a message has the keys "role" and "content", and no others')
        if message["role"] not in ROLES:
            raise UsageError(f"unknown role {message['role']!r}", hint=f"known: {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise UsageError("the content of a message must be text")
    return [dict(message) for message in messages]


class Guard:
    """Keeps control tokens that are written out in a message from acting as control tokens.

    Before rendering, a mark is put into each of them, after its first character; and where a text
    ends like the beginning of one, for the next text may complete it. The template handles the
    text as ever. The rendered prompt is then cut at the marks and the parts are tokenised one by
    one, so that no token spans a mark. Text without control tokens gets no mark and stays exactly
    what transformers would tokenise.
    """

    def __init__(self, controls: Sequence[str]) -> None:
        self._anywhere = re.compile(
            "|".join(f"(?={re.escape(text)})" for text in controls) or "(?!)"
        )
        self._beginnings = {text[:end] for text in controls for end in range(1, len(text))}
        self._longest = max(map(len, controls), default=0)

    def marked(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], str]:
        """The messages with marks, and the mark: a character that none of them contains."""
        texts = [message["content"] for message in messages]
        mark = next((mark for mark in _MARKS if not any(mark in text for text in texts)), None)
        if mark is None:
            raise UsageError("the messages contain every Unicode noncharacter from U+FDD0 on")
        return [
            message | {"content": self._mark(message["content"], mark)} for message in messages
        ], mark

    def _mark(self, text: str, mark: str) -> str:
        cuts = {match.start() + 1 for match in self._anywhere.finditer(text)}
        for length in range(1, min(self._longest, len(text) + 1)):
            if text[-length:] in self._beginnings:
                cuts.add(len(text) - length + 1)
        parts, at = [], 0
        for cut in sorted(cuts):
            parts.append(text[at:cut])
            at = cut
        return mark.join([*parts, text[at:]])


class ChatTemplate:
    """A model's chat template with the process that renders it, started when first needed."""

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        self._source = source
        self._fixed = {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
        self._worker: _proc.Worker | None = None

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt for the assistant's next turn.

        Raises UsageError when the template refuses these messages, UnsafeModelError when it breaks
        out of its bounds, UnsupportedModelError when it does not work at all.
        """
        if len(self._source) > template_worker.MAX_TEMPLATE_CHARACTERS:
            raise UnsafeModelError(f"the chat template has {len(self._source)} characters")
        request: dict[str, Any] = {
            "variables": self._fixed | {"messages": messages, "add_generation_prompt": True}
        }
        if self._worker is None:
            self._worker = self._start()
            request["template"] = self._source
        answer = self._worker.ask(request, timeout_s=2 * template_worker.TIMEOUT_S)
        in_time = answer is not None
        if answer is None:
            limit = f"{template_worker.TIMEOUT_S:g} s"
            answer = {"unsafe": f"it took more than {limit}, or killed its process"}
        if "text" in answer:
            return str(answer["text"])
        self.close()
        if "refused" in answer:
            raise UsageError(f"the model's chat template refuses this chat: {answer['refused']}")
        if "unsafe" in answer:
            raise UnsafeModelError(
                f"the model's chat template left its bounds: {answer['unsafe']}",
                hint="do not use this model, or complete plain prompts instead of a chat"
                + ("" if in_time else "; where much else runs on the machine, try once more"),
            )
        raise UnsupportedModelError(f"the model's chat template fails: {answer['broken']}")

    def _start(self) -> _proc.Worker:
        if importlib.util.find_spec("jinja2") is None:
            raise MissingExtraError("llama", missing="jinja2")
        return _proc.Worker(
            "edgekit.runtimes.template_worker:serve",
            timeout_s=_START_TIMEOUT_S,
            what="the process that renders chat templates",
        )

    def close(self) -> None:
        """End the process; a later ``render`` starts another."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None
