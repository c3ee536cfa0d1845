"""Real chat templates give the very text that transformers gives."""

from __future__ import annotations

from pathlib import Path

from edgekit.runtimes.chat import ChatTemplate

CHAT = [
    {"role": "user", "content": "Hello, <world> & 'friends'"},
    {"role": "assistant", "content": "Hi there."},
    {"role": "user", "content": "  What is 2 + 2?\nThanks — 世界  "},
]


def test_every_template_that_transformers_renders_is_rendered_alike(llama_source: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    compared = 0
    differing = []
    for file in sorted((llama_source / "vendor/llama.cpp/models/templates").glob("*.jinja")):
        source = file.read_text("utf-8")
        try:
            [expected], _ = render_jinja_template(
                [CHAT],
                chat_template=source,
                add_generation_prompt=True,
                bos_token="<s>",
                eos_token="</s>",
            )
        except Exception:  # a template that wants more than a chat: nothing to compare with
            continue
        template = ChatTemplate(source, bos="<s>", eos="</s>")
        try:
            rendered = template.render(CHAT)
        finally:
            template.close()
        compared += 1
        if rendered != expected:
            differing.append(file.name)
    assert differing == []
    assert compared >= 50
