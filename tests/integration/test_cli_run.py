"""`edgekit run` as a user types it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Cli = Callable[..., Any]


def test_an_answer_goes_to_stdout_and_the_speed_to_stderr(cli: Cli, smollm2_gguf: Path) -> None:
    options = ("--raw", "--max-tokens", "4", "--threads", "1")
    done = cli("run", smollm2_gguf, "The capital of France is", *options)
    assert done.code == 0
    assert "Paris" in done.stdout
    assert "tok/s" in done.stderr and "tok/s" not in done.stdout


def test_json_is_one_document_and_nothing_else(cli: Cli, smollm2_gguf: Path) -> None:
    options = ("--json", "--max-tokens", "5", "--threads", "1", "--logprobs", "2")
    done = cli("run", smollm2_gguf, "Say hello", "--system", "Be brief.", *options)
    assert done.code == 0
    document = json.loads(done.stdout)
    assert set(document) == {"text", "tokens", "finish_reason", "timings", "logprobs"}
    assert len(document["tokens"]) == document["timings"]["decode_tokens"] == 5
    assert len(document["logprobs"][0]["top"]) == 2


def test_an_embedding_is_printed(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("run", smollm2_gguf, "Some text", "--embed", "--json", "--threads", "1")
    vector = json.loads(done.stdout)["embedding"]
    assert len(vector) == 576
    assert abs(sum(x * x for x in vector) - 1) < 1e-4


def test_a_schema_may_stand_on_the_command_line(cli: Cli, smollm2_gguf: Path) -> None:
    schema = '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}'
    done = cli("run", smollm2_gguf, "Fine?", "--json-schema", schema, "--threads", "1")
    assert isinstance(json.loads(done.stdout)["ok"], bool)


def test_mistakes_have_exit_code_2_and_one_line(cli: Cli, smollm2_gguf: Path) -> None:
    for options in (
        ("--temperature", "-1"),
        ("--json-schema", "{"),
        ("--grammar", "no-such-file"),
        ("--lora", "adapter.gguf:much"),
        ("--raw", "--system", "x"),
    ):
        done = cli("run", smollm2_gguf, "hi", "--threads", "1", *options)
        assert done.code == 2, options
        assert done.stdout == "" and done.stderr.startswith("error: ")


def test_a_choice_that_does_not_exist_is_answered_with_the_choices(
    cli: Cli, smollm2_gguf: Path
) -> None:
    for option, known in (("--kv-type", "q8_0"), ("--pooling", "cls")):
        done = cli("run", smollm2_gguf, "hi", option, "q3")
        assert (done.code, done.stdout) == (2, "")
        assert known in done.stderr


def test_the_engine_can_be_named(cli: Cli, smollm2_gguf: Path) -> None:
    assert cli("run", smollm2_gguf, "hello", "--runtime", "echo").stdout == "hello\n"
    done = cli("run", smollm2_gguf, "hello", "--runtime", "ecko")
    assert done.code == 2
    assert "did you mean 'echo'?" in done.stderr


def test_a_prompt_cache_that_cannot_be_written_is_a_warning_beside_the_answer(
    cli: Cli, smollm2_gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    options = ("--max-tokens", "2", "--threads", "1", "--no-flash-attention")
    done = cli("run", smollm2_gguf, "hi", "--prompt-cache", "file/cache", *options)
    assert done.code == 0 and done.stdout
    [warning] = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "file/cache" in warning


def test_a_prompt_that_is_too_long_has_exit_code_7(cli: Cli, smollm2_gguf: Path) -> None:
    done = cli("run", smollm2_gguf, "word " * 100, "--n-ctx", "64", "--threads", "1")
    assert done.code == 7
    assert "64" in done.stderr


def test_a_chat_in_a_terminal_answers_until_the_user_leaves(smollm2_gguf: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = ["run", str(smollm2_gguf), "--max-tokens", "5", "--threads", "1"]
    chat = subprocess.Popen(
        [sys.executable, "-m", "edgekit", *arguments],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TERM": "dumb"},
    )
    os.write(ours, b"/help\n/nonsense\n/system You are a parrot.\nHello\n/reset\nHello\n/exit\n")
    stdout, stderr = chat.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert chat.returncode == 0
    assert stderr.count("tok/s]") == 2
    assert "unknown command /nonsense" in stderr
    assert stdout.strip()
