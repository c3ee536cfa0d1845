"""The known holes of GGUF readers, one promise a test: a lying file is refused by name."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz.parts import (
    ARRAY,
    F32,
    I32,
    STRING,
    U32,
    Parts,
    Tensor,
    numbers,
    take_apart,
    text,
    texts,
    u32,
    u64,
)
from fuzz.seeds import seeds

from edgekit.errors import CorruptArtifactError
from edgekit.formats import gguf

Refused = Callable[[Parts | bytes, str], None]
F32_TENSOR, Q4_K_TENSOR = 0, 12


@pytest.fixture
def sound(tmp_path: Path) -> Parts:
    """A tiny llama that every engine loads."""
    return take_apart(seeds(tmp_path)["llama-q4_0"])


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Checks that a file is refused with these words, at once, on one printable line."""

    def check(what: Parts | bytes, says: str) -> None:
        path = tmp_path / "hostile.gguf"
        path.write_bytes(what.build() if isinstance(what, Parts) else what)
        start = time.process_time()
        with pytest.raises(CorruptArtifactError) as caught:
            gguf.read(path)
        assert time.process_time() - start < 1
        assert says in caught.value.message
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 300

    return check


def _with_tensor(shape: tuple[int, ...], code: int = F32_TENSOR, offset: int = 0) -> Parts:
    return Parts(tensors=[Tensor(b"a.weight", shape, code, offset)], data=bytes(4096))


# Sizes


@pytest.mark.parametrize(
    "shape",
    [
        (1 << 32, 1 << 32),
        (1 << 62, 4),
        (1 << 63, 2),
        (1 << 31, 1 << 31, 1 << 2, 1),
        ((1 << 64) - 32, 1),
    ],
)
def test_cve_2025_53630_shapes_that_wrap_around_in_64_bits(
    shape: tuple[int, ...], refused: Refused
) -> None:
    refused(_with_tensor(shape), "impossible shape")


def test_cve_2025_53630_tensor_sizes_that_wrap_around_when_they_are_added(
    refused: Refused,
) -> None:
    huge = ((1 << 61) - 8,)
    tensors = [Tensor(b"t%d" % n, huge, F32_TENSOR, n * 4 * huge[0]) for n in range(2)]
    refused(Parts(tensors=tensors, data=bytes(64)), "too late")


def test_cve_2026_27940_padding_that_wraps_the_size_around(refused: Refused) -> None:
    """4 times this shape is 2**64 less one alignment: padded, it would be nothing."""
    refused(_with_tensor(((1 << 62) - 8,)), "too late")


@pytest.mark.parametrize("code", [F32_TENSOR, Q4_K_TENSOR])
def test_cve_2026_33298_bytes_that_wrap_around_though_the_elements_fit(
    code: int, refused: Refused
) -> None:
    refused(_with_tensor((1 << 40, 1 << 22), code), "too late")


def test_cve_2026_7482_a_tensor_that_ends_behind_the_file(sound: Parts, refused: Refused) -> None:
    columns, rows = sound.tensors[0].shape
    sound.tensors[0].shape = (columns, rows * 1000)
    refused(sound, "too late")
    refused(_with_tensor((1025,)), "ends 4 bytes too late")


def test_a_file_cut_inside_its_last_tensor(sound: Parts, refused: Refused) -> None:
    refused(sound.build()[:-32], "too late")


def test_a_tensor_that_starts_behind_the_file(refused: Refused) -> None:
    refused(_with_tensor((4,), offset=1 << 40), "too late")
    refused(_with_tensor((4,), offset=(1 << 64) - 32), "too late")


def test_tensors_that_share_bytes(refused: Refused) -> None:
    tensors = [Tensor(b"a", (64,), F32_TENSOR, 0), Tensor(b"b", (64,), F32_TENSOR, 224)]
    refused(Parts(tensors=tensors, data=bytes(4096)), "tensors 'a' and 'b' overlap")


def test_a_tensor_off_its_alignment(refused: Refused) -> None:
    refused(_with_tensor((4,), offset=4), "no multiple of 32")


@pytest.mark.parametrize("shape", [(), (0,), (32, 0), (32,) * 5, (1,) * 4000])
def test_a_tensor_without_values_or_with_too_many_dimensions(
    shape: tuple[int, ...], refused: Refused
) -> None:
    refused(_with_tensor(shape), "shape" if 0 in shape else "dimensions")


@pytest.mark.parametrize("code", [4, 5, 31, 33, 36, 38, 43, 255, 1 << 31, (1 << 32) - 1])
def test_a_tensor_type_that_was_removed_or_never_was(code: int, refused: Refused) -> None:
    refused(_with_tensor((256,), code), f"unknown type {code}")


def test_rows_that_are_no_whole_blocks(refused: Refused) -> None:
    refused(_with_tensor((128, 2), Q4_K_TENSOR), "no multiple of Q4_K's 256")


# Counts and lengths


@pytest.mark.parametrize("count", [(1 << 16) + 1, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_absurd_counts_in_the_first_bytes(count: int, refused: Refused) -> None:
    refused(Parts(entry_count=count), "announces")
    refused(Parts(tensor_count=count), "announces")


@pytest.mark.parametrize("count", [1 << 22, 1 << 32, 1 << 60, (1 << 64) - 1])
@pytest.mark.parametrize("code", [0, U32, STRING])
def test_absurd_array_lengths(count: int, code: int, refused: Refused) -> None:
    parts = Parts()
    parts.set("a", ARRAY, u32(code) + u64(count))
    refused(parts, "array elements")


def test_a_vocabulary_of_more_than_a_million_tokens(refused: Refused) -> None:
    parts = Parts()
    count = (1 << 20) + 1
    parts.set("tokenizer.ggml.tokens", ARRAY, u32(STRING) + u64(count) + u64(0) * count)
    refused(parts, "1048577 tokens")


@pytest.mark.parametrize("code", [0, U32, STRING])
def test_an_array_longer_than_the_file(code: int, refused: Refused) -> None:
    parts = Parts()
    parts.set("a", ARRAY, u32(code) + u64(1 << 20))
    refused(parts, "left")


@pytest.mark.parametrize("length", [1 << 24, 1 << 31, 1 << 62, (1 << 64) - 1])
def test_a_string_longer_than_the_file(length: int, refused: Refused) -> None:
    parts = Parts()
    parts.set("general.name", STRING, u64(length) + b"short")
    refused(parts, "'general.name' ")


def test_a_string_in_an_array_longer_than_the_file(refused: Refused) -> None:
    parts = Parts()
    parts.set("a", ARRAY, u32(STRING) + u64(2) + text("sound") + u64((1 << 64) - 8) + b"x")
    refused(parts, "string of")


def test_no_43_byte_file_of_lying_numbers_hangs_as_in_gguf_0_19(tmp_path: Path) -> None:
    rng = random.Random(0)
    lies = [0, 1, 3, 8, 1 << 32, 1 << 40, 1 << 62, *((1 << 64) - n for n in (1, 8, 19, 27, 43))]
    codes = [0, U32, STRING, ARRAY, 99]
    path = tmp_path / "hostile.gguf"
    for _ in range(2000):
        raw = b"GGUF" + u32(3) + u64(rng.choice((0, 1, 30_000))) + u64(rng.choice((1, 30_000)))
        while len(raw) < 43:
            raw += rng.choice((u64(rng.choice(lies)), u32(rng.choice(codes)), b"abc"))
        path.write_bytes(raw[:43])
        start = time.process_time()
        with contextlib.suppress(CorruptArtifactError):
            assert len(gguf.read(path).metadata) == 1
        assert time.process_time() - start < 0.1, raw.hex()


def test_nested_arrays(refused: Refused) -> None:
    for depth in (1, 2, 100_000):
        parts = Parts()
        parts.set("a", ARRAY, (u32(ARRAY) + u64(1)) * depth + u32(U32) + u64(1) + u32(1))
        refused(parts, "array of the type 9")


# Keys


def test_the_37_byte_file_with_an_empty_key(refused: Refused) -> None:
    raw = b"GGUF" + u32(3) + u64(0) + u64(1) + text("") + u32(0) + b"\x01"
    assert len(raw) == 37
    refused(raw, "empty key")


def test_a_key_that_is_given_twice(sound: Parts, refused: Refused) -> None:
    sound.entries.append(sound.entry("llama.block_count"))
    refused(sound, "'llama.block_count' twice")


def test_a_key_that_is_not_text(sound: Parts, refused: Refused) -> None:
    sound.entries[0].key = b"general.\xff"
    refused(sound, "not UTF-8")


def test_text_that_engines_cut_at_a_nul(sound: Parts, refused: Refused) -> None:
    whole = sound.build()
    for name in (b"general.name", b"token_embd.weight", b"tiny"):
        refused(whole.replace(name, name[:-2] + b"\0" + name[-1:]), "with a NUL in it")


def test_a_key_of_65536_bytes(sound: Parts, refused: Refused) -> None:
    sound.entries[0].key = b"k" * 65536
    refused(sound, "limit is 65535")


def test_a_key_that_would_write_to_the_terminal(refused: Refused) -> None:
    parts = Parts()
    parts.set("\x1b[2J\n\u202e", ARRAY, u32(ARRAY) + u64(1))
    refused(parts, "\\x1b")


@pytest.mark.parametrize("code", [13, 99, (1 << 32) - 1])
def test_an_unknown_value_type(code: int, refused: Refused) -> None:
    parts = Parts()
    parts.set("a", code, u64(1))
    refused(parts, f"unknown type {code}")


def test_a_tensor_name_that_is_given_twice(sound: Parts, refused: Refused) -> None:
    sound.tensors[1].name = sound.tensors[0].name
    refused(sound, "'token_embd.weight' twice")


@pytest.mark.parametrize(
    ("name", "says"), [(b"", "without a name"), (b"n" * 64, "limit"), (b"\xff", "not UTF-8")]
)
def test_an_impossible_tensor_name(name: bytes, says: str, sound: Parts, refused: Refused) -> None:
    sound.tensors[0].name = name
    refused(sound, says)


# Values that engines rely on


@pytest.mark.parametrize("alignment", [0, 1, 4, 33, 1 << 17, 1 << 31, (1 << 32) - 1])
def test_an_alignment_that_is_no_power_of_two_or_absurd(alignment: int, refused: Refused) -> None:
    parts = _with_tensor((4,))
    parts.set("general.alignment", U32, u32(alignment))
    refused(parts, f"alignment {alignment}")


@pytest.mark.parametrize(
    ("key", "code", "payload"),
    [
        ("general.architecture", U32, u32(1)),
        ("general.alignment", STRING, text("32")),
        ("tokenizer.ggml.model", U32, u32(1)),
        ("tokenizer.ggml.tokens", STRING, text("a")),
        ("tokenizer.ggml.tokens", ARRAY, numbers(I32, "i", 1, 2)),
        ("tokenizer.ggml.merges", ARRAY, numbers(I32, "i", 1, 2)),
        ("tokenizer.ggml.scores", ARRAY, texts("a")),
        ("tokenizer.ggml.scores", U32, u32(1)),
        ("tokenizer.ggml.token_type", ARRAY, numbers(F32, "f", 1.0)),
        ("tokenizer.ggml.bos_token_id", STRING, text("1")),
        ("tokenizer.ggml.eos_token_id", ARRAY, numbers(I32, "i", 1)),
    ],
)
def test_a_well_known_key_of_the_wrong_type(
    key: str, code: int, payload: bytes, sound: Parts, refused: Refused
) -> None:
    sound.set(key, code, payload)
    refused(sound, f"{key}")


@pytest.mark.parametrize("key", ["scores", "token_type"])
def test_fewer_scores_or_types_than_tokens(key: str, sound: Parts, refused: Refused) -> None:
    short = numbers(F32, "f", 0.0) if key == "scores" else numbers(I32, "i", 1)
    sound.set(f"tokenizer.ggml.{key}", ARRAY, short)
    refused(sound, f"tokenizer.ggml.{key} has 1 of 286 values")


@pytest.mark.parametrize("value", [286, 1 << 20, 1 << 31])
def test_a_special_token_outside_the_vocabulary(value: int, sound: Parts, refused: Refused) -> None:
    sound.set("tokenizer.ggml.eos_token_id", U32, u32(value))
    refused(sound, f"eos_token_id' is {value}")


@pytest.mark.parametrize(
    "pair",
    [
        ("same", "same"),
        ("", "[EMPTY_0]"),
        ("same\0one", "same\0two"),
        ("same", "same\0"),
        (b"\xff\xfe", b"\xff\xfe"),
    ],
)
def test_equal_token_texts_which_abort_llama_cpp(
    pair: tuple[bytes | str, ...], sound: Parts, refused: Refused
) -> None:
    tokens = [f"token {index}" for index in range(284)]
    sound.set("tokenizer.ggml.tokens", ARRAY, texts(*pair, *tokens))
    refused(sound, "the same text")


def test_byte_tokens_in_a_bert_vocabulary_which_abort_llama_cpp(
    sound: Parts, refused: Refused
) -> None:
    sound.set("tokenizer.ggml.model", STRING, text("bert"))
    refused(sound, "byte tokens")


def test_a_missing_byte_token_which_aborts_llama_cpp_at_a_later_prompt(
    sound: Parts, refused: Refused
) -> None:
    tokens = sound.entry("tokenizer.ggml.tokens")
    tokens.payload = tokens.payload.replace(b"<0xE4>", b"<0xEE*")
    refused(sound, "no token <0xE4>")
