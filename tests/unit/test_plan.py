"""A plan says what fits and how fast, from a header alone; exit code 8 where it does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import planned_gguf
import pytest

from edgekit import device_config
from edgekit.errors import EdgekitError, SourceError, UnknownNameError, UsageError
from edgekit.plan import plan
from edgekit.planned_model import planned

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Writes a folder that holds nothing but a config.json."""

    def write(body: dict[str, Any] = LLAMA_8B, **changes: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(body | changes))
        return folder

    return write


def test_an_8b_model_fits_16_gb_and_not_4(config: Any) -> None:
    large, small = plan(config(), "rpi5-16gb"), plan(config(), "rpi5-4gb")
    assert large.fits and not small.fits
    assert large.memory.weights == pytest.approx(4.92e9, rel=0.02)
    assert small.memory.margin < 0 < large.memory.margin
    assert large.decode is not None and large.decode.low < 2.17 < large.decode.high


def test_the_parts_add_up(config: Any) -> None:
    memory = plan(config(), "rpi5").memory
    assert sum(memory.weights_by_type.values()) == memory.weights
    assert memory.total == memory.weights + memory.kv_cache + memory.compute + memory.runtime
    # 2 x 8 heads x 128 values x 32 layers x 4096 tokens in float16
    assert memory.kv_cache == 2 * 8 * 128 * 32 * 4096 * 2


def test_cache_types_contexts_and_sequences_change_the_cache(config: Any) -> None:
    def cache(**options: Any) -> int:
        return plan(config(), "rpi5-16gb", **options).memory.kv_cache

    assert cache(kv_type="q8_0") == pytest.approx(cache() * 34 / 64)
    assert cache(context=8192) == 2 * cache()
    assert cache(batch=4) == 4 * cache()


def test_a_window_bounds_the_cache(config: Any) -> None:
    gemma = LLAMA_8B | {"model_type": "gemma3_text", "sliding_window": 1024, "head_dim": 128}
    full = plan(config(), "rpi5-16gb", context=32768).memory.kv_cache
    windowed = plan(config(gemma), "rpi5-16gb", context=32768).memory.kv_cache
    assert windowed < full / 3


def test_without_a_wish_a_config_is_planned_with_4_bits_and_4096_tokens(config: Any) -> None:
    found = plan(config(), "rpi5-16gb")
    assert (found.type, found.context, found.threads) == ("Q4_K_M", 4096, 4)
    assert plan(config(), "rpi5-16gb", bits=8).type == "Q8_0"
    assert plan(config(), "rpi5-16gb", type="iq4_xs").type == "IQ4_XS"


def test_the_recommendation_fits_where_the_wish_does_not(config: Any) -> None:
    found = plan(config(), "rpi5", bits=8, context=32768)
    assert not found.fits
    best = found.recommended
    assert best.type and best.context and best.bits
    assert plan(config(), "rpi5", type=best.type, context=best.context).fits
    nothing = plan(config(), "rpi-zero2w").recommended
    assert nothing.type is None and nothing.context is None


def test_a_small_gpu_takes_some_layers_and_a_large_one_all(config: Any) -> None:
    small, large = plan(config(), "gpu-4gb"), plan(config(), "gpu-12gb")
    assert small.gpu_layers is not None and 5 < small.gpu_layers < 32
    assert large.gpu_layers == 32
    assert small.memory.gpu < 4 << 30
    assert small.decode and large.decode and small.decode.mid < large.decode.mid
    assert plan(config(), "rpi5-16gb").gpu_layers is None


def test_the_beginning_of_a_gguf_file_is_enough(smollm2_gguf: Path, tmp_path: Path) -> None:
    head = tmp_path / "head.gguf"
    with smollm2_gguf.open("rb") as file:
        head.write_bytes(file.read(4 << 20))
    part, whole = plan(head, "rpi4"), plan(smollm2_gguf, "rpi4")
    assert part.to_dict() | {"model": ""} == whole.to_dict() | {"model": ""}
    assert part.type == "Q4_1" and plan(head, "rpi4", bits=4).type == "Q4_K_M"


def test_every_figure_of_the_answer_says_where_it_comes_from(config: Any) -> None:
    found = plan(config(), "rpi5-16gb")
    names = " ".join(each.name for each in found.inputs)
    for word in ("memory", "system keeps", "read bandwidth", "peak", "reading from"):
        assert word in names
    assert all(each.origin for each in found.inputs)


def test_a_vision_model_has_a_latency(config: Any) -> None:
    found = plan(config({"model_type": "mobilenet_v2"}), "rpi5")
    assert found.latency_ms is not None and found.decode is None
    assert 5 < found.latency_ms.mid < 60
    small = plan(config({"model_type": "mobilenet_v2"}), "rpi5", bits=8)
    assert small.latency_ms and small.latency_ms.mid < found.latency_ms.mid
    assert small.memory.weights < found.memory.weights / 3


def test_a_device_of_the_user_has_the_profile_that_was_named(config: Any, home: Path) -> None:
    (home / "config").mkdir()
    device_config.path().write_text("devices:\n  kitchen: {ssh: pi@kitchen, profile: rpi4}\n")
    assert plan(config(), "kitchen").device == "rpi4"
    with pytest.raises(UnknownNameError, match="not measured yet"):
        plan(config(), "local")
    with pytest.raises(UnknownNameError, match="cellar"):
        plan(config(), "cellar")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 0}, "context must lie"),
        ({"context": 1 << 20}, "131072"),
        ({"batch": 0}, "batch"),
        ({"threads": 64}, "cores of Raspberry Pi 5"),
        ({"kv_type": "q9"}, "kv_type"),
        ({"bits": 7}, "7 bits"),
        ({"bits": 4, "type": "Q4_0"}, "not both"),
    ],
)
def test_impossible_wishes_are_refused(config: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan(config(), "rpi5", **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -1},
        {"hidden_size": "4096"},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 1 << 40},
        {"model_type": "alien"},
        {"model_type": None},
        {"auto_map": {"AutoModel": "x.y"}},
        {"num_attention_heads": True},
    ],
    ids=str,
)
def test_a_strange_config_is_refused_by_name(config: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(SourceError):
        planned(config(**changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", (1 << 32) - 1),
        ("embedding_length", -576),
        ("attention.head_count", -1),
        ("attention.key_length", (1 << 32) - 1),
        ("expert_count", -8),
    ],
)
def test_a_lying_gguf_header_is_refused_at_once(tmp_path: Path, key: str, value: int) -> None:
    header = planned_gguf.header(num_hidden_layers=2)
    lying = replace(header, metadata=header.metadata | {f"llama.{key}": value})
    with pytest.raises(SourceError, match=key):
        plan(planned_gguf.write(lying, tmp_path / "lies.gguf"), "rpi5")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    for name in ("text.txt", "none.gguf", "."):
        with pytest.raises(EdgekitError):
            planned(tmp_path / name)


def test_the_command_prints_the_document_and_ends_with_8(cli: Any, config: Any) -> None:
    done = cli("plan", config(), "--device", "rpi5-4gb", "--json")
    assert done.code == 8
    body = json.loads(done.stdout)
    assert body["fits"] is False
    parts = {"weights", "kv_cache", "compute", "runtime", "total", "available"}
    assert parts <= body["memory_bytes"].keys()
    for speed in ("decode_tok_s", "prefill_tok_s"):
        assert body[speed]["low"] < body[speed]["mid"] < body[speed]["high"]
    assert body["bound"] == "memory"
    assert {"bits", "type", "context", "threads"} <= body["recommended"].keys()
    assert {"name", "value", "unit", "source", "origin"} == body["inputs"][0].keys()
    assert "does not fit" in done.stderr


def test_the_command_shows_a_plan_to_people(cli: Any, config: Any) -> None:
    done = cli("plan", config(), "--device", "rpi5-16gb")
    assert done.code == 0
    for words in ("fits", "decode", "prefill", "KV cache", "read bandwidth", "llama.cpp issue"):
        assert words in done.stdout


def test_the_command_validates(cli: Any) -> None:
    done = cli("plan", "--validate")
    assert done.code == 0
    assert "median" in done.stdout and "impossible" in done.stdout
    assert cli("plan").code == 2


def test_devices_are_listed_and_shown(cli: Any, home: Path) -> None:
    (home / "config").mkdir()
    device_config.path().write_text("devices:\n  kitchen: {ssh: pi@kitchen, profile: rpi4}\n")
    listed = cli("devices", "list")
    assert listed.code == 0
    assert "kitchen" in listed.stdout and "rpi5-16gb" in listed.stdout
    shown = cli("devices", "show", "kitchen")
    assert "Cortex-A72" in shown.stdout and "assumed" in shown.stdout
    (home / "config/profiles").mkdir()
    yaml = cli("devices", "show", "rpi5", "--yaml").stdout.replace("rpi5", "mine")
    (home / "config/profiles/mine.yaml").write_text(yaml)
    body = json.loads(cli("devices", "show", "mine", "--json").stdout)
    assert body["cpu"]["cores"]["value"] == 4
    assert cli("devices", "show", "nobody").code == 2


def test_what_was_quantized_before_is_never_recommended_with_more_bits(smollm2_gguf: Path) -> None:
    best = plan(smollm2_gguf, "rpi5").recommended
    assert (best.type, best.bits) == ("Q4_1", 6)  # 30 MB of it are an embedding of Q8_0
    smaller = plan(smollm2_gguf, "rpi-zero2w", context=8192)
    assert not smaller.fits
    assert smaller.recommended.type is not None
