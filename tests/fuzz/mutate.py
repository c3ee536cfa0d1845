"""Hostile GGUF files made from a sound one: flips, cuts, lying numbers, and the known attacks.

The same seed of the random generator gives the same files. Knows nothing of who reads them.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator

from fuzz.parts import (
    ARRAY,
    F32,
    I32,
    STRING,
    U32,
    U64,
    Entry,
    Parts,
    Tensor,
    numbers,
    take_apart,
    text,
    texts,
    u32,
    u64,
)

_LIES = (0, 1, 2, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32)
_BIG_LIES = ((1 << 40) + 1, 1 << 61, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def _flip(raw: bytes, rng: random.Random) -> bytes:
    """One to sixteen bits, half of the time in the first kilobyte."""
    out = bytearray(raw)
    reach = len(out) if rng.random() < 0.5 else min(len(out), 1024)
    for _ in range(rng.choice((1, 1, 2, 16))):
        out[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _truncate(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def _splice(raw: bytes, rng: random.Random) -> bytes:
    """A stretch is lost, doubled, or overwritten with noise."""
    start = rng.randrange(len(raw))
    end = min(len(raw), start + rng.randrange(1, 64))
    middle = rng.choice((b"", raw[start:end] * 2, rng.randbytes(end - start)))
    return raw[:start] + middle + raw[end:]


def _lie(raw: bytes, rng: random.Random) -> bytes:
    """One number of the header (a length, count, type, size or offset) is not what it was."""
    at, width = rng.choice(take_apart(raw).places)
    true = int.from_bytes(raw[at : at + width], "little")
    lies = [*_LIES, *_BIG_LIES, true + 1, true - 1, true << 32, true ^ (1 << 31), -true]
    value = rng.choice(lies) % (1 << 8 * width)
    return raw[:at] + value.to_bytes(width, "little") + raw[at + width :]


def _empty_key(parts: Parts, rng: random.Random) -> None:
    rng.choice(parts.entries).key = b""


def _duplicate_key(parts: Parts, rng: random.Random) -> None:
    parts.entries.append(copy.copy(rng.choice(parts.entries)))


def _key_not_utf8(parts: Parts, rng: random.Random) -> None:
    rng.choice(parts.entries).key = b"general.\xff\xfe"


def _long_key(parts: Parts, rng: random.Random) -> None:
    rng.choice(parts.entries).key = b"k" * 70_000


def _wrong_type(parts: Parts, rng: random.Random) -> None:
    entry = rng.choice(parts.entries)
    entry.code, entry.payload = rng.choice(
        (
            (U32, u32(7)),
            (STRING, text("seven")),
            (ARRAY, texts("a", "b")),
            (ARRAY, numbers(F32, "f", 1.0, float("nan"))),
            (ARRAY, numbers(I32, "i", 1, -2)),
            (U64, u64(1 << 63)),
        )
    )


def _nested_array(parts: Parts, rng: random.Random) -> None:
    deep = b"".join(u32(ARRAY) + u64(1) for _ in range(rng.choice((1, 2, 2000))))
    parts.set("a.nest", ARRAY, deep + u32(U32) + u64(1) + u32(1))


def _absurd_counts(parts: Parts, rng: random.Random) -> None:
    count = rng.choice((1 << 20, 1 << 32, 1 << 60, (1 << 64) - 1))
    if rng.random() < 0.5:
        parts.entry_count = count
    else:
        parts.tensor_count = count


def _absurd_array(parts: Parts, rng: random.Random) -> None:
    count = rng.choice((1 << 20, 1 << 32, 1 << 60, 1 << 61, (1 << 64) - 1))
    parts.set("a.long", ARRAY, u32(rng.choice((0, STRING, U64, ARRAY))) + u64(count))


def _absurd_text(parts: Parts, rng: random.Random) -> None:
    length = rng.choice((1 << 31, 1 << 62, (1 << 63) - 1, (1 << 64) - 1))
    parts.set("general.name", STRING, u64(length) + b"short")


def _hostile_alignment(parts: Parts, rng: random.Random) -> None:
    parts.set("general.alignment", U32, u32(rng.choice((0, 1, 3, 33, 1 << 31, (1 << 32) - 1))))


def _tokens(parts: Parts, rng: random.Random) -> None:
    """Token texts that are equal, empty, cut by a NUL, not UTF-8, or fewer than their types."""
    size = rng.choice((0, 1, 2, 40, 300))
    raw = [f"t{index}".encode() for index in range(size)]
    for _ in range(min(size, rng.choice((1, 2)))):
        raw[rng.randrange(size)] = rng.choice((b"", b"t0", b"t0\0x", b"\xff\xfe", b"[EMPTY_1]"))
    parts.set("tokenizer.ggml.tokens", ARRAY, texts(*raw))


def _special_id(parts: Parts, rng: random.Random) -> None:
    name = rng.choice(("bos", "eos", "unknown", "padding"))
    value = rng.choice((40, 1 << 20, 1 << 31, (1 << 32) - 1))
    parts.set(f"tokenizer.ggml.{name}_token_id", U32, u32(value))


def _tensor_of(parts: Parts, rng: random.Random) -> Tensor:
    if not parts.tensors:
        parts.tensors.append(Tensor(b"a.weight", (32, 2), 0, 0))
    return rng.choice(parts.tensors)


def _overflowing_shape(parts: Parts, rng: random.Random) -> None:
    """The products of these wrap around in 64 bits, some of them to something small."""
    _tensor_of(parts, rng).shape = rng.choice(
        (
            (1 << 32, 1 << 32),
            (1 << 62, 4, 4, 1),
            (1 << 63, 2),
            ((1 << 63) - 32, 1),
            ((1 << 64) - 32, 32),
            (1 << 31, 1 << 31, 2, 1),
            (0, 1 << 63),
        )
    )


def _too_large(parts: Parts, rng: random.Random) -> None:
    _tensor_of(parts, rng).shape = (32, rng.choice((1 << 12, 1 << 26, 1 << 40)))


def _hostile_offset(parts: Parts, rng: random.Random) -> None:
    tensor = _tensor_of(parts, rng)
    tensor.offset = rng.choice((1, 32, 1 << 20, 1 << 40, (1 << 63) - 32, (1 << 64) - 32))


def _duplicate_tensor(parts: Parts, rng: random.Random) -> None:
    parts.tensors.append(copy.copy(_tensor_of(parts, rng)))


def _tensor_name(parts: Parts, rng: random.Random) -> None:
    _tensor_of(parts, rng).name = rng.choice((b"", b"n" * 64, b"n" * 5000, b"\xff", b"a\0b"))


def _tensor_type(parts: Parts, rng: random.Random) -> None:
    _tensor_of(parts, rng).code = rng.choice((4, 5, 31, 36, 43, 99, 12, 1 << 31))


def _dimensions(parts: Parts, rng: random.Random) -> None:
    _tensor_of(parts, rng).shape = (32,) * rng.choice((0, 5, 8, 4000))


def _many_entries(parts: Parts, rng: random.Random) -> None:
    count = rng.choice((1000, 5000))
    parts.entries += [Entry(b"k%d" % index, 7, b"\x01") for index in range(count)]


_ATTACKS: tuple[Callable[[Parts, random.Random], None], ...] = (
    _empty_key,
    _duplicate_key,
    _key_not_utf8,
    _long_key,
    _wrong_type,
    _nested_array,
    _absurd_counts,
    _absurd_array,
    _absurd_text,
    _hostile_alignment,
    _tokens,
    _special_id,
    _overflowing_shape,
    _too_large,
    _hostile_offset,
    _duplicate_tensor,
    _tensor_name,
    _tensor_type,
    _dimensions,
    _many_entries,
)
_EDITS: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _truncate, _splice, _lie)


def mutants(seed: bytes, count: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """``count`` hostile files made from one sound file, each with the name of what was done."""
    for index in range(count):
        if index % 2:
            attack = _ATTACKS[index // 2 % len(_ATTACKS)]
            parts = take_apart(seed)
            attack(parts, rng)
            yield f"{index}{attack.__name__}", parts.build()
        else:
            edit = rng.choice(_EDITS)
            yield f"{index}{edit.__name__}", edit(seed, rng)
