"""Bounds on what may be asked, and arithmetic that needs no engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import UsageError
from edgekit.formats import gguf
from edgekit.runtime import GenerateParams, Generation, LoadParams, merged
from edgekit.runtimes import gpu_layers


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
        {"seed": 1 << 32},
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


def test_as_many_layers_go_to_the_gpu_as_fit(smollm2_gguf: Path) -> None:
    header = gguf.read(smollm2_gguf)
    reserve = 512 << 20
    assert gpu_layers.count(header, 4096, 0) == 0
    assert gpu_layers.count(header, 4096, reserve) == 0
    few = gpu_layers.count(header, 4096, reserve + (30 << 20))
    more = gpu_layers.count(header, 4096, reserve + (60 << 20))
    assert 0 < few < more < 30
    assert gpu_layers.count(header, 64, reserve + (60 << 20)) > more
    assert gpu_layers.count(header, 4096, 8 << 30) == gpu_layers.ALL_LAYERS
