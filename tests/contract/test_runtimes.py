"""What every runtime on the shelf promises, whatever its engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekit.errors import EdgekitError, PromptTooLongError, UsageError
from edgekit.registry import RUNTIMES
from edgekit.runtime import LoadParams, Session

N_CTX = 64


@pytest.fixture(params=list(RUNTIMES))
def session(request: pytest.FixtureRequest, smollm2_gguf: Path) -> Iterator[Session]:
    runtime = RUNTIMES.load(request.param)()
    params = LoadParams(
        n_ctx=N_CTX, n_threads=1, embeddings=request.node.name.startswith("test_em")
    )
    with runtime.load(smollm2_gguf, params) as session:
        yield session


def test_the_pieces_of_a_stream_are_the_text(session: Session) -> None:
    pieces = list(session.stream("One two three", max_tokens=8))
    assert "".join(pieces) == session.last.text != ""


def test_greedy_gives_the_same_answer_every_time(session: Session) -> None:
    first = session.complete("One two three", max_tokens=8)
    again = session.complete("One two three", max_tokens=8)
    assert (first.text, first.tokens) == (again.text, again.tokens)


def test_max_tokens_ends_a_generation_with_length(session: Session) -> None:
    done = session.complete("One two three", max_tokens=3)
    assert (done.decode_tokens, done.finish_reason) == (3, "length")


def test_a_stop_string_ends_a_generation_and_is_not_shown(session: Session) -> None:
    whole = session.complete("One two three", max_tokens=12).text
    stop = whole[2:5]
    done = session.complete("One two three", max_tokens=12, stop=(stop,))
    assert done.finish_reason == "stop"
    assert done.text == whole[: whole.index(stop)]


def test_a_full_context_ends_a_generation_with_length(session: Session) -> None:
    done = session.complete("One two three " * 3, max_tokens=10_000)
    assert done.finish_reason in ("length", "stop")
    assert done.prompt_tokens + done.decode_tokens <= N_CTX + 1


def test_a_prompt_that_does_not_fit_is_an_error_with_numbers(session: Session) -> None:
    with pytest.raises(PromptTooLongError, match=str(N_CTX)):
        session.stream("word " * N_CTX)


def test_a_chat_streams_an_answer(session: Session) -> None:
    assert session.has_chat_template
    messages = [{"role": "user", "content": "Say hello"}]
    assert "".join(session.chat(messages, max_tokens=8)) == session.last.text != ""


def test_text_comes_back_from_its_tokens(session: Session) -> None:
    text = "Grüße, 世界 🙂"
    assert session.detokenize(session.tokenize(text)) == text


def test_embeddings_have_length_one(session: Session) -> None:
    vector = session.embed("One two three")
    assert sum(x * x for x in vector) == pytest.approx(1.0, abs=1e-4)
    assert vector == session.embed("One two three")
    assert vector != session.embed("Something else")


def test_an_unknown_field_or_a_value_out_of_bounds_is_a_usage_error(session: Session) -> None:
    with pytest.raises(UsageError, match="max_token"):
        session.stream("hi", max_token=3)
    with pytest.raises(UsageError, match="temperature"):
        session.stream("hi", temperature=-1)


def test_a_closed_session_refuses_to_work(session: Session) -> None:
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.stream("hi")


@pytest.mark.parametrize("name", list(RUNTIMES))
def test_a_file_that_is_not_there_is_a_typed_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(EdgekitError):
        RUNTIMES.load(name)().load(tmp_path / "no.gguf", LoadParams())


def test_a_stream_that_was_never_begun_is_refused_after_close(session: Session) -> None:
    stream = session.stream("One two three", max_tokens=4)
    session.close()
    with pytest.raises(UsageError, match="closed"):
        next(stream)


def test_of_two_streams_only_the_newer_goes_on(session: Session) -> None:
    older = session.stream("One two three", max_tokens=8)
    newer = session.stream("Four five six", max_tokens=8)
    with pytest.raises(UsageError, match="another generation"):
        next(older)
    assert "".join(newer) == session.last.text != ""
