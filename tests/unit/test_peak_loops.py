"""The loops are what their listings say, and read not a byte beyond what they were given."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit import peak_loops
from edgekit.peak_loops import SETS

TOOLS = {"avx2": "", "avx512": "", "neon": "aarch64-linux-gnu-"}


@pytest.mark.parametrize("loop", ["multiply", "read"])
@pytest.mark.parametrize("name", SETS)
def test_the_bytes_are_what_an_assembler_makes_of_the_words(
    name: str, loop: str, tmp_path: Path
) -> None:
    if not shutil.which(TOOLS[name] + "as"):
        pytest.skip(f"there is no {TOOLS[name]}as here")
    listing = getattr(SETS[name], loop)
    source, made, code = (tmp_path / f"loop.{end}" for end in ("s", "o", "bin"))
    source.write_text(listing.text)
    subprocess.run([TOOLS[name] + "as", source, "-o", made], check=True)
    copy = [TOOLS[name] + "objcopy", "-O", "binary", "-j", ".text", made, code]
    subprocess.run(copy, check=True)
    assert code.read_bytes().hex() == listing.code.hex()


def test_a_cpu_gets_the_loops_that_it_can_run() -> None:
    assert peak_loops.choose("aarch64", ()) is SETS["neon"]
    assert peak_loops.choose("x86_64", ("AVX2", "FMA")) is SETS["avx2"]
    assert peak_loops.choose("x86_64", ("AVX2", "FMA", "AVX512")) is SETS["avx512"]
    assert peak_loops.choose("x86_64", ("AVX2",)) is None
    assert peak_loops.choose("riscv64", ()) is None


READ_TO_THE_EDGE = f"""
import ctypes, mmap
from edgekit import peak_loops
loops = peak_loops.of_this_cpu()
libc = ctypes.CDLL(None)
page = mmap.PAGESIZE
room = mmap.mmap(-1, 3 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(room))
if libc.mprotect(ctypes.c_void_p(start + 2 * page), ctypes.c_size_t(page), 0):
    raise SystemExit("no guard page")
for size in (0, 63, 64, 383, 384, 385, 1000, page, 2 * page):
    read = loops.read(start + 2 * page - size, size)
    assert 0 <= size - read < {peak_loops.STREAMS * 64}, (size, read)
print(loops.multiply(1000))
"""


def test_reading_ends_before_a_page_that_must_not_be_read() -> None:
    if peak_loops.of_this_cpu() is None:
        pytest.skip("edgekit has no loops for this CPU")
    done = subprocess.run(
        [sys.executable, "-c", READ_TO_THE_EDGE], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in {1000 * loops.multiply.amount for loops in SETS.values()}


def test_a_system_that_forbids_new_code_has_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_name: str) -> int:
        raise OSError("not permitted")

    monkeypatch.setattr(peak_loops.os, "memfd_create", forbidden)
    assert peak_loops.of_this_cpu() is None
