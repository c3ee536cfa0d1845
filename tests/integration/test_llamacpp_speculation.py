"""Speculation may only change how long a greedy answer takes, never the answer."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from edgekit import llama_library
from edgekit.registry import RUNTIMES
from edgekit.runtime import LoadParams
from edgekit.runtimes import speculation

PROMPTS = [
    "The capital of France is",
    'Repeat: {"name": "Ann", "age": 31}\n{"name": "Ann", "age": 31}\n{"name": "Ann", "age": 31}\n',
    "Once upon a time there was a little",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):",
]
_FTYPES = {"F16": 1, "Q4_0": 2}


@pytest.fixture(scope="module", params=list(_FTYPES))
def quantized(
    request: pytest.FixtureRequest, smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    llama = llama_library.libllama()
    out = tmp_path_factory.mktemp("speculation") / f"{request.param}.gguf"
    wanted = llama.llama_model_quantize_default_params()
    wanted.ftype = _FTYPES[request.param]
    wanted.allow_requantize = True
    names = (str(smollm2_gguf).encode(), str(out).encode())
    assert llama.llama_model_quantize(*names, ctypes.byref(wanted)) == 0
    return out


def test_a_speculated_answer_is_the_greedy_answer(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Never pause: the more is drafted, the harder this is.
    monkeypatch.setattr(speculation, "_PAUSE", 0)
    monkeypatch.setattr(speculation, "_WORDS", 2)
    params = LoadParams(n_ctx=512, n_threads=1)
    drafted = 0
    with RUNTIMES.load("llamacpp")().load(quantized, params) as session:
        for prompt in PROMPTS:
            session.reset()
            plain = session.complete(prompt, max_tokens=48)
            session.reset()
            fast = session.complete(prompt, max_tokens=48, speculate=True)
            assert fast.tokens == plain.tokens, prompt
            assert fast.text == plain.text
            drafted += fast.accepted_tokens
    assert drafted > 15


def test_speculation_pauses_when_drafts_are_never_accepted(smollm2_gguf: Path) -> None:
    params = LoadParams(n_ctx=512, n_threads=1)
    with RUNTIMES.load("llamacpp")().load(smollm2_gguf, params) as session:
        prompt = " ".join(f"{i} and {i * i % 7} and" for i in range(60))
        done = session.complete(prompt, max_tokens=60, speculate=True)
        wasted = done.drafted_tokens - done.accepted_tokens
        assert wasted < 60 * speculation._MAX_DRAFT / 2
