"""Bounds on what may be asked, and arithmetic that needs no engine."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit import _fs
from edgekit.errors import OutOfSpaceError, UsageError
from edgekit.formats import gguf
from edgekit.runtime import GenerateParams, Generation, LoadParams, merged
from edgekit.runtimes import cache_file, gpu_layers


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": "hot"},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": math.inf},
        {"repeat_penalty": 0},
        {"logprobs": 101},
        {"seed": -1},
        {"seed": (1 << 32) - 1},
        {"stop": ("",)},
        {"stop": "END"},
        {"stop": ("x",) * 17},
        {"json_schema": {}, "grammar": "root ::= [a]"},
        {"n_keep": -1},
        {"nonsense": 1},
    ],
)
def test_bad_generation_parameters_are_usage_errors(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        merged(None, fields)


def test_single_fields_replace_those_of_the_parameters() -> None:
    base = GenerateParams(max_tokens=7, temperature=0.5)
    changed = merged(base, {"temperature": 0.0, "stop": ["a"]})
    assert (changed.max_tokens, changed.temperature, changed.stop) == (7, 0.0, ("a",))


def test_paths_of_load_parameters_may_be_text() -> None:
    params = LoadParams(prompt_cache="cache", adapters=("a.gguf", ("b.gguf", 0.5)))  # type: ignore[arg-type]
    assert params.prompt_cache == Path("cache")
    assert params.adapters == ((Path("a.gguf"), 1.0), (Path("b.gguf"), 0.5))


def test_speeds_count_only_the_work_that_was_done() -> None:
    done = Generation(prompt_tokens=110, cached_tokens=10, prompt_ms=1000, tokens=[1] * 11)
    done.decode_ms = 100.0
    assert done.prefill_tok_s == 100
    assert done.decode_tok_s == 100  # the first token comes out of the prefill
    assert Generation().decode_tok_s == 0


def test_the_cache_of_a_layer_is_keys_and_values_for_every_token(smollm2_gguf: Path) -> None:
    header = gguf.read(smollm2_gguf)  # 3 heads of 64 for keys and values
    f16 = gpu_layers.layer_cache_bytes(header, LoadParams(n_ctx=1000))
    assert f16 == 1000 * 3 * (64 + 64) * 2
    q8_0 = gpu_layers.layer_cache_bytes(header, LoadParams(n_ctx=1000, kv_type="q8_0"))
    assert q8_0 == f16 * 34 // 64
    lengths = {"llama.attention.key_length": 128, "llama.attention.value_length": 96}
    wide = replace(header, metadata=header.metadata | lengths)
    assert gpu_layers.layer_cache_bytes(wide, LoadParams(n_ctx=1000)) == 1000 * 3 * (128 + 96) * 2


def test_as_many_layers_go_to_the_gpu_as_fit(smollm2_gguf: Path) -> None:
    header = gguf.read(smollm2_gguf)
    reserve = 512 << 20

    def count(free_bytes: int, **fields: Any) -> int:
        return gpu_layers.count(header, LoadParams(**fields), free_bytes)

    assert count(0) == 0
    assert count(reserve) == 0
    few, more = count(reserve + (30 << 20)), count(reserve + (60 << 20))
    assert 0 < few < more < 30
    assert count(reserve + (60 << 20), n_ctx=64) > more
    assert count(reserve + (60 << 20), kv_type="q4_0") > more
    assert count(8 << 30) == gpu_layers.ALL_LAYERS


def test_a_full_disk_is_a_line_in_the_log_where_only_a_cache_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: bytes, *, mode: int) -> None:
        raise OutOfSpaceError(f"the disk filled up while writing {path}")

    monkeypatch.setattr(_fs, "write_atomic", full)
    assert not cache_file.write(tmp_path / "kept", b"", level=logging.WARNING)
    [record] = caplog.records
    assert record.levelname == "WARNING" and str(tmp_path / "kept") in record.getMessage()
