"""Real chat templates give the very text that transformers gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit import llama_library
from edgekit.runtimes.chat import ChatTemplate, Guard
from edgekit.runtimes.llama_engine import Engine

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


@pytest.mark.parametrize("vocabulary", ["llama-spm", "phi-3", "llama-bpe", "qwen2", "gemma-4"])
def test_a_written_out_control_token_comes_back_as_the_same_text(
    llama_source: Path, vocabulary: str
) -> None:
    llama = llama_library.libllama()
    wanted = llama.llama_model_default_params()
    wanted.vocab_only = True
    file = llama_source / f"vendor/llama.cpp/models/ggml-vocab-{vocabulary}.gguf"
    model = llama.llama_model_load_from_file(str(file).encode(), wanted)
    engine = Engine.__new__(Engine)  # no weights and no context: only text and tokens
    engine._llama = llama
    engine._read_vocabulary(llama.llama_model_get_vocab(model))
    controls = engine.control_texts()
    text = f"x{controls[-1]}y {controls[0]}z"
    guard = Guard(controls)
    [marked], mark = guard.marked([{"role": "user", "content": text}])
    first, *rest = marked["content"].split(mark)
    tokens = engine.tokenize(first, special=True)
    for part in rest:
        tokens += engine.tokenize_on(part)
    assert len(rest) == 2
    # SentencePiece puts one space in front of the very first word.
    assert b"".join(map(engine.piece, tokens)).decode().removeprefix(" ") == text
    llama.llama_model_free(model)
