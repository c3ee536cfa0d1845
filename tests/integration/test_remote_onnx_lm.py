"""ONNX language models on a board behind a real sshd: run, embed, eval and bench as for GGUFs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sshd

import edgekit
from edgekit import evaluate, remote
from edgekit.errors import UsageError
from edgekit.target import Local, open_target

Float = Callable[[str], edgekit.Artifact]
HOW: dict[str, Any] = {"n_ctx": 64, "chunks": 2, "threads": 1}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Board]:
    folder = tmp_path_factory.mktemp("board")
    with pytest.MonkeyPatch.context() as patch, sshd.board(folder, patch) as made:
        yield made


def test_an_answer_from_a_board_is_the_same_answer(
    board: sshd.Board, cli: Callable[..., Any], float_model: Float
) -> None:
    words = ("run", float_model("llama3").path, "Name a colour: $(id) `id`")
    words += ("--max-tokens", "8", "--threads", "1", "--temperature", "0", "--json")
    here, there = cli(*words), cli(*words, "--device", "board")
    assert there.code == 0, there.stderr
    tokens = [json.loads(each.stdout)["tokens"] for each in (here, there)]
    assert tokens[0] == tokens[1] and 0 < len(tokens[0]) <= 8
    assert sshd.eventually(lambda: not sshd.processes_with(f"{board.home}/venv/bin/python"))


def test_a_grammar_is_kept_on_the_board(
    board: sshd.Board, cli: Callable[..., Any], float_model: Float, tmp_path: Path
) -> None:
    (tmp_path / "ab.gbnf").write_text('root ::= "a" | "bb"\n')
    words = ("run", float_model("llama3").path, "Say a or bb", "--grammar", "ab.gbnf", "--json")
    there = cli(*words, "--device", "board")
    assert there.code == 0, there.stderr
    assert json.loads(there.stdout)["text"] in ("a", "bb")


@pytest.mark.slow
def test_an_evaluation_and_a_vector_from_a_board_are_the_same(
    board: sshd.Board, float_model: Float, tiny_gguf: Callable[[str], Path]
) -> None:
    model, text = float_model("llama3").path, evaluate.read_text(None)[:4000]
    here = evaluate.perplexity(model, text, **HOW)
    with open_target("board") as there, Local() as local:
        found = remote.perplexity_on(there, model, text, **HOW)
        both = remote.compare_on(there, model, tiny_gguf("llama3"), text, **HOW)
        vectors = [
            remote.embed_on(target, model, "a", pooling="mean", fields={"n_threads": 1})
            for target in (there, local)
        ]
    assert found.value == here.value and found.tokens == here.tokens
    assert 0 <= both.mean_kl.value < 0.002
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-6) and len(vectors[0]) == 64


@pytest.mark.slow
def test_eval_on_a_board_from_the_command_line(
    board: sshd.Board, cli: Callable[..., Any], float_model: Float
) -> None:
    words = ("eval", float_model("llama3").path, "--ctx", "64", "--chunks", "1", "--json")
    here, there = cli(*words), cli(*words, "--device", "board")
    assert there.code == 0, there.stderr
    found = [json.loads(each.stdout) for each in (here, there)]
    assert found[1]["device"] == "board" and found[0]["value"] == found[1]["value"]


@pytest.mark.slow
def test_a_bare_file_brings_the_files_that_it_needs(
    board: sshd.Board, float_model: Float, tmp_path: Path
) -> None:
    for path in float_model("llama3").path.iterdir():
        if path.name != "manifest.json":
            shutil.copy(path, tmp_path)
    (tmp_path / "secret.txt").write_text("of somebody else")
    text = evaluate.read_text(None)[:4000]
    here = evaluate.perplexity(tmp_path / "model.onnx", text, **HOW)
    with open_target("board") as there:
        found = remote.perplexity_on(there, tmp_path / "model.onnx", text, **HOW)
        report = remote.bench_on(
            there,
            tmp_path / "model.onnx",
            probe=False,
            threads=(1,),
            prompts=(16,),
            answers=(4,),
            repetitions=1,
            sessions=False,
        )
    assert found.value == here.value
    assert [row.test for row in report.rows] == ["pp16", "tg4"]
    kept = [path.read_bytes() for path in (board.home / "blobs").iterdir()]
    assert b"of somebody else" not in kept


def test_a_model_of_tensors_is_refused_before_the_way(tmp_path: Path) -> None:
    (tmp_path / "vision.onnx").write_bytes(b"")
    with Local() as here, pytest.raises(UsageError, match="no language model"):
        remote.perplexity_on(here, tmp_path / "vision.onnx", "text")
