"""The loops that take a CPU to its limits: one multiplies and adds in registers, one reads memory.

Knows the vector instructions of x86-64 and aarch64; never caches, threads or models. No library
that edgekit could call has such loops: numpy's products and sums reach some 85% of them.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from edgekit import machine

# What the reading loop reads side by side, so that the memory's queues are full, and in a turn.
STREAMS = 6
_TURN_BYTES = 64


@dataclass(frozen=True)
class Listing:
    """A function in GNU assembler's words, and as the bytes these stand for.

    A test puts the words through an assembler and compares. ``amount`` is the work of one turn:
    FLOP of a multiplying loop, bytes of a reading one.
    """

    text: str
    code: bytes
    amount: int


@dataclass(frozen=True)
class Listings:
    """The loops of one instruction set.

    ``multiply(turns)`` adds a product to each of so many accumulators that they keep all units of
    the CPU busy while each waits for its last sum. ``read(turns, address, stride)`` loads 64 bytes
    a turn from each of ``STREAMS`` places, which begin ``stride`` bytes apart.
    """

    multiply: Listing
    read: Listing


def _lines(pattern: str, registers: Iterable[int]) -> str:
    return "".join(pattern.format(register) + "\n" for register in registers)


# x86-64: arguments in rdi, rsi and rdx; every vector register may be overwritten (System V ABI).
_PLACES = ("(%rsi)", "(%rsi,%rdx)", "(%rsi,%rdx,2)", "(%rsi,%r8)", "(%rsi,%rdx,4)", "(%rsi,%r9)")
_STRIDES = "lea (%rdx,%rdx,2), %r8\nlea (%rdx,%rdx,4), %r9\n1:\n"
_AGAIN = "dec %rdi\njnz 1b\nvzeroupper\nret\n"
_AVX2 = Listings(
    Listing(
        text=_lines("vxorps %ymm{0}, %ymm{0}, %ymm{0}", range(14))
        + "1:\n"
        + _lines("vfmadd231ps %ymm12, %ymm13, %ymm{0}", range(12))
        + _AGAIN,
        code=bytes.fromhex(
            "c5fc57c0 c5f457c9 c5ec57d2 c5e457db c5dc57e4 c5d457ed c5cc57f6 c5c457ff c4413c57c0"
            "c4413457c9 c4412c57d2 c4412457db c4411c57e4 c4411457ed"
            "c4c215b8c4 c4c215b8cc c4c215b8d4 c4c215b8dc c4c215b8e4 c4c215b8ec c4c215b8f4"
            "c4c215b8fc c44215b8c4 c44215b8cc c44215b8d4 c44215b8dc 48ffcf 75bf c5f877 c3"
        ),
        amount=2 * 12 * 8,
    ),
    Listing(
        text=_STRIDES
        + "".join(
            f"vmovups {place}, %ymm{2 * i}\nvmovups 32{place}, %ymm{2 * i + 1}\n"
            for i, place in enumerate(_PLACES)
        )
        + "add $64, %rsi\n"
        + _AGAIN,
        code=bytes.fromhex(
            "4c8d0452 4c8d0c92 c5fc1006 c5fc104e20 c5fc101416 c5fc105c1620 c5fc102456 c5fc106c5620"
            "c4a17c103406 c4a17c107c0620 c57c100496 c57c104c9620 c4217c10140e c4217c105c0e20"
            "4883c640 48ffcf 75b3 c5f877 c3"
        ),
        amount=STREAMS * _TURN_BYTES,
    ),
)
_AVX512 = Listings(
    Listing(
        text=_lines("vpxorq %zmm{0}, %zmm{0}, %zmm{0}", [*range(20), 30, 31])
        + "1:\n"
        + _lines("vfmadd231ps %zmm30, %zmm31, %zmm{0}", range(20))
        + _AGAIN,
        code=bytes.fromhex(
            "62f1fd48efc0 62f1f548efc9 62f1ed48efd2 62f1e548efdb 62f1dd48efe4 62f1d548efed"
            "62f1cd48eff6 62f1c548efff 6251bd48efc0 6251b548efc9 6251ad48efd2 6251a548efdb"
            "62519d48efe4 62519548efed 62518d48eff6 62518548efff 62a1fd40efc0 62a1f540efc9"
            "62a1ed40efd2 62a1e540efdb 62018d40eff6 62018540efff"
            "62920540b8c6 62920540b8ce 62920540b8d6 62920540b8de 62920540b8e6 62920540b8ee"
            "62920540b8f6 62920540b8fe 62120540b8c6 62120540b8ce 62120540b8d6 62120540b8de"
            "62120540b8e6 62120540b8ee 62120540b8f6 62120540b8fe 62820540b8c6 62820540b8ce"
            "62820540b8d6 62820540b8de 48ffcf 7583 c5f877 c3"
        ),
        amount=2 * 20 * 16,
    ),
    Listing(
        text=_STRIDES
        + "".join(f"vmovups {place}, %zmm{i}\n" for i, place in enumerate(_PLACES))
        + "add $64, %rsi\n"
        + _AGAIN,
        code=bytes.fromhex(
            "4c8d0452 4c8d0c92 62f17c481006 62f17c48100c16 62f17c48101456 62b17c48101c06"
            "62f17c48102496 62b17c48102c0e 4883c640 48ffcf 75ce c5f877 c3"
        ),
        amount=STREAMS * _TURN_BYTES,
    ),
)

# aarch64: arguments come in x0, x1 and x2; vector registers 8 to 15 belong to the caller (AAPCS64).
_CHAINS = range(16, 32)
_POINTERS = (1, 3, 4, 5, 6, 7)
_PAIRS = tuple((first, first + 1) for first in (*range(16, 32, 2), *range(0, 8, 2)))


def _words(words: Iterable[int]) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


def _back(instructions: int) -> int:
    """subs x0, x0, #1; b.ne so many instructions back; ret."""
    return 0x54000001 | (-instructions & 0x7FFFF) << 5


_NEON = Listings(
    Listing(
        text=_lines("movi v{}.4s, #0", [0, 1, *_CHAINS])
        + "1:\n"
        + _lines("fmla v{}.4s, v0.4s, v1.4s", _CHAINS)
        + "subs x0, x0, #1\nb.ne 1b\nret\n",
        code=_words(
            [0x4F000400 | register for register in (0, 1, *_CHAINS)]
            + [0x4E21CC00 | register for register in _CHAINS]
            + [0xF1000400, _back(len(_CHAINS) + 1), 0xD65F03C0]
        ),
        amount=2 * len(_CHAINS) * 4,
    ),
    Listing(
        text="".join(
            f"add x{pointer}, x{before}, x2\n" for before, pointer in itertools.pairwise(_POINTERS)
        )
        + "1:\n"
        + "".join(
            f"ldp q{first}, q{second}, [x{_POINTERS[i // 2]}], #32\n"
            for i, (first, second) in enumerate(_PAIRS)
        )
        + "subs x0, x0, #1\nb.ne 1b\nret\n",
        code=_words(
            [
                0x8B020000 | before << 5 | pointer
                for before, pointer in itertools.pairwise(_POINTERS)
            ]
            + [
                0xACC10000 | second << 10 | _POINTERS[i // 2] << 5 | first
                for i, (first, second) in enumerate(_PAIRS)
            ]
            + [0xF1000400, _back(len(_PAIRS) + 1), 0xD65F03C0]
        ),
        amount=STREAMS * _TURN_BYTES,
    ),
)
SETS = {"avx2": _AVX2, "avx512": _AVX512, "neon": _NEON}


def choose(architecture: str, features: tuple[str, ...]) -> Listings | None:
    """The loops for a CPU with ``features`` (``machine.FEATURES``); None where there are none."""
    if architecture in ("aarch64", "arm64"):
        return _NEON  # every one of them has it
    if architecture == "x86_64" and "AVX512" in features:
        return _AVX512
    if architecture == "x86_64" and {"AVX2", "FMA"} <= set(features):
        return _AVX2
    return None


@dataclass(frozen=True)
class Loops:
    """The loops of this CPU, ready to run; they let go of Python's lock meanwhile."""

    _listings: Listings
    _multiply: Callable[..., None]
    _read: Callable[..., None]

    def multiply(self, turns: int) -> int:
        """Returns the FLOP that it took."""
        self._multiply(turns)
        return turns * self._listings.multiply.amount

    def read(self, address: int, size_bytes: int) -> int:
        """Read memory from ``address`` on; returns how much of ``size_bytes`` it read."""
        stride = size_bytes // STREAMS // _TURN_BYTES * _TURN_BYTES
        turns = stride // _TURN_BYTES
        if turns:
            self._read(turns, address, stride)
        return turns * self._listings.read.amount


def of_this_cpu() -> Loops | None:
    """The loops of the CPU that this process runs on.

    None where edgekit has none for it, or the system lets no program bring code of its own.
    """
    # Never from a fixture tree, which may tell of another CPU: a wrong loop ends the process.
    listings = choose(platform.machine(), machine.cpu(Path("/")).features)
    if listings is None:
        return None
    try:
        return Loops(listings, _function(listings.multiply, 1), _function(listings.read, 3))
    except (AttributeError, OSError):  # not Linux, or forbidden
        return None


def _function(listing: Listing, arguments: int) -> Callable[..., None]:
    """``listing`` as a function, in memory that is never writable and executable at once."""
    file = os.memfd_create("edgekit-loop")
    try:
        os.write(file, listing.code)
        libc = ctypes.CDLL(None, use_errno=True)
        number = ctypes.c_long
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, number)
        rights = mmap.PROT_READ | mmap.PROT_EXEC
        address = libc.mmap(None, len(listing.code), rights, mmap.MAP_PRIVATE, file, 0)
    finally:
        os.close(file)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "no executable memory")
    return ctypes.CFUNCTYPE(None, *[number] * arguments)(address)
