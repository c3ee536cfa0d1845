"""Hostile chat templates: each ends in time, with our error, and nothing of theirs runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgekit import _proc
from edgekit.errors import EdgekitError, UnsafeModelError, UnsupportedModelError, UsageError
from edgekit.runtimes.chat import ChatTemplate, Guard, check_messages

MESSAGES = [{"role": "user", "content": "hello"}]
LIMIT_S = 2.0

ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ [].__class__.__base__.__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ joiner.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "{{ namespace.__init__.__globals__.os.system('touch MARKER') }}",
    "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARKER', 'w') }}",
    "{{ self._TemplateReference__context.environment }}{{ self.x.__class__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARKER', 'w') }}",
    "{{ raise_exception.__closure__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ()|attr('__class__')|attr('__base__')|attr('__subclasses__')() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "{{ ('{0.__cl' ~ 'ass__}').format(messages) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{{ ('{0.__class__}'|attr('format'))(1) }}",
    "{{ ['{0.__class__.__mro__}']|map('format', 1)|list|first.__class__ }}",
    "{{ messages|map(attribute='__class__')|list|first.x }}",
    "{{ [messages]|map(attribute='append')|first.__self__ }}",
    "{{ messages.append({'role': 'system', 'content': 'evil'}) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].pop('role') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "{% from 'os' import system %}{{ system('touch MARKER') }}",
    "{% extends '/etc/passwd' %}",
    "{{ __import__('os').system('touch MARKER') }}",
    "{{ open('MARKER', 'w') }}",
    "{{ eval('1') }}",
    "{{ (messages|tojson).__class__.__mro__ }}",
    "{% macro m() %}{{ caller.__globals__.x }}{% endmacro %}{% call m() %}{% endcall %}",
    "{{ loop.__init__.__globals__ }}",
]
BOMBS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 'ab'.center(10**9) }}",
    "{{ 'ab'.zfill(10**10) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ 10 ** (10 ** 8) }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ lipsum(n=10**7) }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ ['a']|batch(10**9, 'x')|list }}",
    "{{ 'a b'|wordwrap(1)|replace('', 'x' * 10**8)|replace('', 'y' * 99) }}",
    "{{ ('(' * 99999) }}{{ ((('a' * 9999999)|list)|map('upper')|list) * 99 }}",
    "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "{% if 1 %}" * 5_000,
    "{{ 'x'.expandtabs() }}{{ ('\\t' * 99999).expandtabs(99999) }}",
]


@pytest.mark.parametrize("payload", ESCAPES + BOMBS, ids=lambda text: text[:40])
def test_a_hostile_template_ends_in_time_with_a_typed_error(
    payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within ``LIMIT_S`` of wall time the error is raised and the template's process is gone,
    counted from the moment that process is ready: how long Python takes to start is not its doing.
    """
    marker = tmp_path / "ran"
    template = ChatTemplate(payload.replace("MARKER", str(marker)), bos="<s>", eos="</s>")
    start = ChatTemplate._start
    ready_s: list[float] = []

    def timed(self: ChatTemplate) -> _proc.Worker:
        worker = start(self)
        ready_s.append(time.monotonic())
        return worker

    monkeypatch.setattr(ChatTemplate, "_start", timed)
    try:
        with pytest.raises((UnsafeModelError, UnsupportedModelError)):
            template.render(MESSAGES)
    finally:
        template.close()
    assert time.monotonic() - ready_s[0] < LIMIT_S
    assert len(ready_s) == 1
    assert not marker.exists()


def test_there_are_sixty_payloads() -> None:
    assert len(set(ESCAPES + BOMBS)) >= 60


def test_a_template_can_refuse_a_chat_and_the_next_one_still_works() -> None:
    template = ChatTemplate(
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}ok",
        bos="",
        eos="",
    )
    with pytest.raises(UsageError, match="user first"):
        template.render([{"role": "system", "content": "x"}])
    assert template.render(MESSAGES) == "ok"
    template.close()


def test_the_worker_cannot_open_files_even_outside_the_sandbox() -> None:
    worker = _proc.Worker(f"{__name__}:escaped", timeout_s=30, what="the test's worker")
    assert worker.ask({"variables": {}, "template": "x"}, timeout_s=5) == {"broken": "OSError"}
    worker.close()


def escaped() -> None:
    """In the child: a worker whose sandbox has a hole that opens files."""
    from edgekit.runtimes import template_worker

    def answer(environment: object, template: object, request: object) -> object:
        try:
            Path("/etc/passwd").read_text()
        except OSError:
            return template, {"broken": "OSError"}
        return template, {"text": "read it"}

    template_worker._answer = answer  # type: ignore[assignment]
    template_worker.serve()


def test_marks_break_every_control_token_and_nothing_else() -> None:
    guard = Guard(["<|im_end|>", "<s>", "<|im_start|>"])
    text = "a<s>b <|im_<|im_end|> 1 < 2 <|im_"
    [marked], mark = guard.marked([{"role": "user", "content": text}])
    parts = marked["content"].split(mark)
    assert "".join(parts) == text
    assert not any("<s>" in part or "<|im_end|>" in part for part in parts)
    assert guard.marked(MESSAGES)[0] == MESSAGES


def test_a_text_cannot_bring_the_mark_along() -> None:
    guard = Guard(["<s>"])
    _, mark = guard.marked([{"role": "user", "content": "\ufdd0\ufdd1"}])
    assert mark == "\ufdd2"
    every = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(EdgekitError):
        guard.marked([{"role": "user", "content": every}])


def test_checked_messages_are_copies() -> None:
    messages = [{"role": "user", "content": "x"}]
    checked = check_messages(messages)
    checked[0]["content"] = "y"
    assert messages[0]["content"] == "x"
