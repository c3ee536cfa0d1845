"""What every runtime on the shelf promises, whatever its engine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_torch
import torch

from edgekit import exporter
from edgekit.errors import EdgekitError, PromptTooLongError, UsageError
from edgekit.registry import RUNTIMES
from edgekit.runtime import LoadParams, Session, TensorSession
from edgekit.runtime import load as load_any

N_CTX = 64
# Runtimes of tensors -> the format that they read.
TENSORS = {"ort": "onnx", "openvino": "onnx", "litert": "tflite"}
# Runtimes of language models -> the format that they read.
LANGUAGE = {name: "gguf" for name in RUNTIMES if name not in TENSORS} | {"ort": "onnx"}


@pytest.fixture(scope="session")
def language_files(
    smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """SmolLM2 in a format; never write to it."""
    out = tmp_path_factory.mktemp("language") / "smollm2"

    def file(format: str) -> Path:
        if format == "gguf":
            return smollm2_gguf
        if not out.exists():
            # 8 bits are rounded, without a text to fit them to: seconds.
            exporter.export(smollm2_gguf, format, bits=8, receipt=False, out=out)
        return out / "model.onnx"

    return file


def _where_installed(names: Iterable[str]) -> list[Any]:
    """The runtimes, each skipped where its package is missing: not every extra is always there."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(not RUNTIMES.installed(name), reason=f"{name} is missing"),
        )
        for name in names
    ]


Open = Callable[[str, bool], Session]


@pytest.fixture(scope="session")
def open_session(language_files: Callable[[str], Path]) -> Open:
    """Load SmolLM2 with a runtime, for embeddings or not."""

    def load(runtime: str, embeddings: bool) -> Session:
        params = LoadParams(n_ctx=N_CTX, n_threads=1, embeddings=embeddings)
        session: Session = RUNTIMES.load(runtime)().load(language_files(LANGUAGE[runtime]), params)
        return session

    return load


@pytest.fixture(scope="module")
def loaded(open_session: Open) -> Iterator[Open]:
    """The same, once for all tests that close nothing."""
    sessions: dict[tuple[str, bool], Session] = {}

    def load(runtime: str, embeddings: bool) -> Session:
        key = runtime, embeddings
        sessions[key] = sessions.get(key) or open_session(runtime, embeddings)
        return sessions[key]

    yield load
    for session in sessions.values():
        session.close()


@pytest.fixture(params=LANGUAGE)
def session(request: pytest.FixtureRequest, loaded: Open) -> Session:
    session = loaded(request.param, request.node.name.startswith("test_em"))
    session.reset()
    return session


@pytest.fixture(params=LANGUAGE)
def to_close(request: pytest.FixtureRequest, open_session: Open) -> Iterator[Session]:
    """A session of the test's own."""
    with open_session(request.param, False) as session:
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


def test_a_closed_session_refuses_to_work(to_close: Session) -> None:
    to_close.close()
    to_close.close()
    with pytest.raises(UsageError, match="closed"):
        to_close.stream("hi")


@pytest.mark.parametrize("name", _where_installed(RUNTIMES))
def test_a_file_that_is_not_there_is_a_typed_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(EdgekitError):
        RUNTIMES.load(name)().load(tmp_path / "no.gguf", LoadParams())


def test_a_stream_that_was_never_begun_is_refused_after_close(to_close: Session) -> None:
    stream = to_close.stream("One two three", max_tokens=4)
    to_close.close()
    with pytest.raises(UsageError, match="closed"):
        next(stream)


def test_of_two_streams_only_the_newer_goes_on(session: Session) -> None:
    older = session.stream("One two three", max_tokens=8)
    newer = session.stream("Four five six", max_tokens=8)
    with pytest.raises(UsageError, match="another generation"):
        next(older)
    assert "".join(newer) == session.last.text != ""


# Grammars: the same words for every engine that follows one


@pytest.fixture(params=sorted(set(LANGUAGE) - {"echo"}))
def following(request: pytest.FixtureRequest, loaded: Open) -> Session:
    session = loaded(request.param, False)
    session.reset()
    return session


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "colour": {"enum": ["red", "green"]},
    },
    "required": ["name", "age", "colour"],
}
SAMPLED = {"temperature": 1.5, "top_k": 0, "seed": 5}


@pytest.mark.parametrize("how", [{}, SAMPLED, {"repeat_penalty": 1.3}], ids=str)
def test_a_json_schema_is_kept(following: Session, how: dict[str, Any]) -> None:
    done = following.complete("A person: ", json_schema=PERSON, max_tokens=50, **how)
    # Sampled at such a heat numbers may go on for long, and so may the answer.
    if done.finish_reason == "stop":
        person = json.loads(done.text)
        assert set(person) == {"name", "age", "colour"}
        assert isinstance(person["age"], int) and person["colour"] in ("red", "green")
    else:
        assert done.text.startswith("{") and len(done.tokens) == 50


def test_a_schema_that_refers_to_itself_is_kept(following: Session) -> None:
    schema = {
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "$ref": "#/$defs/tree",
    }
    for seed in range(4):
        how = SAMPLED | {"seed": seed}
        done = following.complete("x", json_schema=schema, max_tokens=40, **how)
        assert set(done.text) <= set("[], ")
        if done.finish_reason == "stop":
            assert isinstance(json.loads(done.text), list)


@pytest.mark.parametrize("how", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("grammar", "allowed"),
    [
        ('root ::= "yes" | "no"', r"yes|no"),
        ('root ::= [0-9]{3} "-" [a-f]+ "."', r"\d{3}-[a-f]+\."),
        ('root ::= item ("," item)*\nitem ::= "ab" | "a" "é"?', r"(ab|aé?)(,(ab|aé?))*"),
        ('root ::= "(" root ")" | "x" # nested', r"\(*x\)*"),
    ],
    ids=["words", "classes", "list", "nested"],
)
def test_a_grammar_is_kept(
    following: Session, grammar: str, allowed: str, how: dict[str, Any]
) -> None:
    done = following.complete("Is the sky blue? ", grammar=grammar, max_tokens=20, **how)
    if done.finish_reason == "stop":
        assert re.fullmatch(allowed, done.text)
        assert done.text.count("(") == done.text.count(")")
    else:
        assert len(done.tokens) == 20


@pytest.mark.parametrize(
    "grammar",
    ["root ::= (", "", "root ::= " + "(" * 30_000, 'a ::= "x"', "root ::= root"],
    ids=lambda text: text[:12],
)
def test_a_grammar_that_does_not_parse_is_a_usage_error(following: Session, grammar: str) -> None:
    with pytest.raises(UsageError, match="grammar") as error:
        following.complete("x", grammar=grammar)
    assert "\n" not in error.value.message


def test_a_stop_string_holds_within_a_grammar_and_log_probabilities_are_the_models_own(
    following: Session,
) -> None:
    free = following.complete("Count: ", max_tokens=1, logprobs=3)
    kept = following.complete("Count: ", grammar='root ::= ("7" | ";")+', stop=(";",), max_tokens=4)
    assert set(kept.text) <= {"7"}
    told = following.complete("Count: ", grammar='root ::= "7" "7"', logprobs=3, max_tokens=4)
    assert told.logprobs[0].top == free.logprobs[0].top
    assert told.logprobs[0].logprob <= free.logprobs[0].logprob


# Runtimes of tensors


Load = Callable[..., TensorSession]


@pytest.fixture(params=_where_installed(TENSORS), scope="module")
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def load(engine: str) -> Load:
    return lambda path, **fields: load_any(path, runtime=engine, **fields)


@pytest.fixture(scope="module")
def artifacts(engine: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier of images, an encoder of texts, and a bare module, in float."""
    folder = tmp_path_factory.mktemp("tensors")
    if engine == "litert":  # the exporter's packages are too large for every run of tests
        import tiny_tflite

        return tiny_tflite.artifacts(folder)
    sources = {
        "image": tiny_torch.vit_folder(folder / "vit"),
        "text": tiny_torch.bert_folder(folder / "bert"),
        "module": tiny_torch.cnn_module(),
    }
    inputs = {"module": torch.zeros(1, 3, tiny_torch.SIDE, tiny_torch.SIDE)}
    return {
        name: exporter.export(
            source,
            TENSORS[engine],
            example_inputs=inputs.get(name),
            bits=32,
            receipt=False,
            out=folder / f"{name}-out",
        ).path
        for name, source in sources.items()
    }


def test_classes_come_best_first_with_their_names(artifacts: dict[str, Path], load: Load) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    with load(artifacts["image"], n_threads=1) as session:
        found = session.classify(picture, top=10)
        assert session.classify(picture, top=3) == found[:3]
    assert {label for label, _ in found} == set(tiny_torch.LABELS)
    shares = [share for _, share in found]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)


def test_an_embedding_has_length_one_and_a_list_gives_a_list(
    artifacts: dict[str, Path], load: Load
) -> None:
    with load(artifacts["text"], n_threads=1) as session:
        one = session.embed("the cat sits on the mat")
        both = session.embed(["the cat sits on the mat", "a dog"])
    assert sum(x * x for x in one) == pytest.approx(1, abs=1e-4)
    assert both[0] == pytest.approx(one, abs=1e-4)
    assert both[1] != pytest.approx(one, abs=1e-2)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"wrong": np.zeros((1, 3, 32, 32), np.float32)},
        {"input": np.zeros((1, 3, 32), np.float32)},
        {"input": np.zeros((1, 4, 32, 32), np.float32)},
        {"input": np.zeros((0, 3, 32, 32), np.float32)},
        {"input": np.zeros((1, 3, 32, 32), np.int64)},
        {"input": [[1, 2], [3]]},
        {"input": "an image"},
    ],
    ids=["none", "name", "rank", "size", "empty", "type", "ragged", "text"],
)
def test_a_wrong_input_is_one_clear_usage_error(
    artifacts: dict[str, Path], load: Load, inputs: dict[str, object]
) -> None:
    with load(artifacts["module"], n_threads=1) as session, pytest.raises(UsageError) as error:
        session.run(inputs)
    assert "\n" not in error.value.message


def test_what_the_model_cannot_do_says_what_it_can(artifacts: dict[str, Path], load: Load) -> None:
    with load(artifacts["image"], n_threads=1) as session:
        with pytest.raises(UsageError) as error:
            session.embed("a text")
        assert "classify" in error.value.hint
    with load(artifacts["text"], n_threads=1) as session, pytest.raises(UsageError):
        session.classify("a text")


def test_numbers_that_are_none_come_out_or_are_refused(
    artifacts: dict[str, Path], load: Load
) -> None:
    """They are the caller's business, as in the library that the model comes from; but an answer
    that hides them would be wrong.
    """
    picture = np.ones((1, 3, 32, 32), np.float32)
    picture[0, 0, 16, 16] = np.nan
    with load(artifacts["module"], n_threads=1) as session:
        try:
            (found,) = session.run({"input": picture}).values()
        except UsageError as error:
            assert "NaN" in error.message
        else:
            assert np.isnan(found).all()


def test_a_closed_model_refuses_to_work(artifacts: dict[str, Path], load: Load) -> None:
    session = load(artifacts["module"], n_threads=1)
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run({"input": np.zeros((1, 3, 32, 32), np.float32)})


def test_parameters_of_language_models_are_refused(artifacts: dict[str, Path], load: Load) -> None:
    with pytest.raises(UsageError, match="n_ctx"):
        load(artifacts["module"], n_ctx=64)
