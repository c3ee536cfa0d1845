"""What a user of ``edgekit.load().stream()`` sees, timed from the outside in a fresh process.

Every function here runs in a child process of a benchmark and answers in JSON. Never knows peers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import measure

import edgekit
from edgekit.errors import InferenceError
from edgekit.runtime import Generation, Session

_ONE_TOKEN = ("The", "In", "When", "It", "There", "As", "One", "Some", "During", "My", "This", "We")


def prompts(model: str, tokens: int, count: int) -> list[str]:
    """``count`` texts of exactly ``tokens`` tokens, no two with the same first token.

    One-token texts are common words; longer ones come from edgekit's own calibration text.
    """
    from edgekit.formats import gguf
    from edgekit.runtime import LoadParams
    from edgekit.runtimes.llama_engine import Engine

    path = Path(model)
    with_engine = Engine(path, gguf.read(path), LoadParams(n_ctx=256), threads=(1, 1))
    try:
        if tokens == 1:
            return [w for w in _ONE_TOKEN if len(with_engine.tokenize(w, special=False)) == 1]
        text = resources.files("edgekit.exporters").joinpath("calibration.txt").read_text("utf-8")
        found: dict[int, str] = {}
        for first, piece in _pieces(with_engine, text, tokens, count):
            found.setdefault(first, piece)
            if len(found) == count:
                return list(found.values())
    finally:
        with_engine.close()
    raise InferenceError(f"the calibration text has no {count} pieces of {tokens} tokens")


def _pieces(engine: Any, text: str, tokens: int, count: int) -> Iterator[tuple[int, str]]:
    """(first token, text) of pieces that tokenize to exactly ``tokens`` tokens, spread out."""
    ids = engine.tokenize(text, special=False)
    last = len(ids) - tokens
    stride = max(1, last // (count * 4))
    for start in (begin + offset for offset in range(stride) for begin in range(0, last, stride)):
        raw = b"".join(engine.piece(token) for token in ids[start : start + tokens])
        try:
            piece = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if engine.tokenize(piece, special=False) == ids[start : start + tokens]:
            yield ids[start], piece


def tests(
    model: str, load: dict[str, Any], warm_up: str, tests: dict[str, dict[str, Any]], samples: int
) -> dict[str, Any]:
    """Load ``model`` once, warm it up, then run every test ``samples`` times.

    A test has ``prompts``, their ``prompt_tokens`` and ``max_tokens``. A prompt whose answer ends
    early is passed over for the next one. Returns per test the lists ``total_s`` (call to last
    piece), ``first_s`` (call to first piece), ``prompt_s`` and ``decode_s`` (the session's own
    figures), and ``rss_bytes``, the process's high water mark.
    """
    with edgekit.load(Path(model), **load) as session:
        for _ in session.stream(warm_up, max_tokens=2):
            pass
        answer: dict[str, Any] = {
            name: _test(session, name, samples=samples, **test) for name, test in tests.items()
        }
    return answer | {"rss_bytes": measure.held_bytes()[1]}


def _test(
    session: Session,
    name: str,
    prompts: list[str],
    prompt_tokens: int,
    max_tokens: int,
    samples: int,
) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {
        key: [] for key in ("total_s", "first_s", "prompt_s", "decode_s")
    }
    passed_over = "there is none"
    for prompt in prompts:
        if len(figures["total_s"]) == samples:
            break
        first_s, total_s = _timed(session, prompt, max_tokens)
        if reason := _unfit(session.last, prompt_tokens, max_tokens):
            passed_over = reason
            continue
        figures["first_s"].append(first_s)
        figures["total_s"].append(total_s)
        figures["prompt_s"].append(session.last.prompt_ms / 1e3)
        figures["decode_s"].append(session.last.decode_ms / 1e3)
    if len(figures["total_s"]) < samples:
        raise InferenceError(f"too few prompts fit the test '{name}': {passed_over}")
    return figures


def _timed(session: Session, prompt: str, max_tokens: int) -> tuple[float, float]:
    """Seconds from the call to the first piece of text, and to the end."""
    first_s = None
    started = time.perf_counter()
    for _ in session.stream(prompt, max_tokens=max_tokens):
        if first_s is None:
            first_s = time.perf_counter() - started
    total_s = time.perf_counter() - started
    return (total_s if first_s is None else first_s), total_s


def _unfit(last: Generation, prompt_tokens: int, max_tokens: int) -> str | None:
    """Why a generation is not the work that llama-bench does."""
    if last.prompt_tokens != prompt_tokens:
        return f"a prompt has {last.prompt_tokens} tokens, not {prompt_tokens}"
    if last.cached_tokens:
        return f"{last.cached_tokens} tokens of a prompt were cached"
    if last.decode_tokens != max_tokens:
        return f"an answer ended after {last.decode_tokens} of {max_tokens} tokens"
    return None
