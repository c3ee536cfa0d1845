"""A real model finds a code in a short text; a model of noise does not, and nothing crashes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran

from edgekit import needle


@pytest.mark.slow
def test_a_real_model_finds_the_code(smollm2_gguf: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    found = needle.evaluate(
        smollm2_gguf,
        lengths=[256, 384],
        depths=[0, 100],
        trials=1,
        threads=1,
        progress=lambda *report: stages.append(report),
    )
    assert found.here.chat
    assert found.here.recall.value > 0.5
    for row in found.here.lengths:
        # Prompt and answer fill the length, but for a part of a sentence.
        assert row.length - 150 < row.tokens < row.length - 32
        assert row.ttft_ms > 0
        # 30 layers with 3 heads of 64 float16 keys and as many values
        assert row.kv_bytes == row.length * 30 * 2 * 3 * 64 * 2
    assert [done for _, done, _ in stages] == [0, 256, 512, 896, 1280]
    assert {total for _, _, total in stages} == {1280}


def test_a_model_without_a_template_is_asked_in_plain_text(
    tiny_gguf: Callable[[str], Path],
) -> None:
    model = tiny_gguf("gpt2")
    found = needle.evaluate(model, against=model, depths=[50], trials=2, threads=1)
    assert not found.here.chat
    assert [row.length for row in found.here.lengths] == [256], "what it was trained for"
    assert found.here.recall.value == 0
    assert found.flips is not None
    assert (found.flips.gained, found.flips.lost) == (0, 0)


def test_a_text_never_outgrows_its_context(
    tiny_gguf: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whatever a tokenizer makes of blanks, line breaks and signs between sentences."""
    text = tmp_path / "lines.txt"
    text.write_text("No!\n?\n\n:-) ... !\n\t- a.\n\n\n" * 50)
    for name in ("llama2", "gpt2", "qwen2"):
        found = needle.evaluate(
            tiny_gguf(name), text=text, lengths=[256], depths=[50], trials=2, threads=1
        )
        (row,) = found.here.lengths
        assert 256 - 80 < row.tokens <= 256 - 32


def test_the_command_prints_a_grid_and_draws_it(
    tiny_gguf: Callable[[str], Path], cli: Callable[..., Ran], tmp_path: Path
) -> None:
    options = ["--needle", "--depths", "0,100", "--trials", "1", "--threads", "1"]
    done = cli("eval", tiny_gguf("llama2"), *options, "--plot", "grid.png")
    assert done.code == 0, done.stderr
    assert "at 0%" in done.stdout and "KV cache" in done.stdout
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    done = cli("eval", tiny_gguf("llama2"), *options, "--json")
    body = json.loads(done.stdout)
    assert body["depths"] == [0, 100]
    assert body["lengths"][0]["hits"] == [0, 0]


def test_options_of_another_measurement_are_refused(
    smollm2_gguf: Path, cli: Callable[..., Ran]
) -> None:
    done = cli("eval", smollm2_gguf, "--needle", "--shots", "2")
    assert (done.code, done.stdout) == (2, "")
    assert "--shots means nothing with --needle" in done.stderr


def test_ctrl_c_ends_a_question_in_the_middle(smollm2_gguf: Path) -> None:
    options = ["--needle", "--lengths", "8192", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekit", "eval", smollm2_gguf, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == "needle ...\n"
        time.sleep(6)  # the model is loaded, and reads thousands of tokens
        process.send_signal(signal.SIGINT)
        started_s = time.monotonic()
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - started_s < 5
    finally:
        process.kill()  # its child dies with it
    assert (process.returncode, out, err.split()[-1]) == (130, "", "stopped")
