"""Weights that the engine lays out anew come to lie in large pages, where the kernel has them."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import pytest

import edgekit
from edgekit.runtimes import huge_pages
from edgekit.runtimes.huge_pages import HugePages

_MIB = 1 << 20


def _asked_for(memory: mmap.mmap) -> bool:
    """Whether the kernel marks the middle of a mapping as one that wants large pages."""
    start = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(start) + len(memory) // 2
    del start
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the mapping is gone")


def _resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


needs_huge_pages = pytest.mark.skipif(
    not huge_pages._huge_page_bytes(), reason="this kernel gives no process large pages"
)


@needs_huge_pages
def test_new_memory_is_asked_for_once_and_old_memory_is_left_alone() -> None:
    old = mmap.mmap(-1, 8 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = HugePages()
    new = mmap.mmap(-1, 64 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert pages.advise() >= 60 * _MIB, "its ends may lie inside a large page"
    assert pages.advise() == 0
    assert _asked_for(new) and not _asked_for(old)
    new.write(bytes(64 * _MIB))
    old.close()
    new.close()


@needs_huge_pages
def test_what_is_written_is_moved_and_stays_as_it_was() -> None:
    pages = HugePages()
    new = mmap.mmap(-1, 64 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    empty = mmap.mmap(-1, 64 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    content = bytes(range(256)) * (64 * _MIB // 256)
    new.write(content)
    before = _resident_bytes()
    pages.collapse()
    assert _asked_for(new) and new[:] == content
    assert _resident_bytes() - before < 8 * _MIB, "what nobody wrote to must not take memory"
    new.close()
    empty.close()


@needs_huge_pages
def test_a_model_whose_weights_are_laid_out_anew_answers_the_same(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    advise = HugePages.advise

    def noted(pages: HugePages) -> int:
        asked.append(advise(pages))
        return asked[-1]

    def answer() -> str:
        with edgekit.load(smollm2_gguf, n_ctx=256, n_threads=1) as session:
            return session.complete("The capital of France is", max_tokens=8).text

    monkeypatch.setattr(HugePages, "advise", lambda _: 0)
    plain = answer()
    monkeypatch.setattr(HugePages, "advise", noted)
    assert answer() == plain
    assert asked and not any(asked[1:]), "the first tensor's call comes before anything is written"


@pytest.mark.parametrize("setting", ["always madvise [never]", "", None])
def test_where_the_kernel_has_none_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    monkeypatch.setattr(huge_pages, "_SETTINGS", tmp_path)
    assert HugePages().advise() == 0


def test_what_the_kernel_joined_to_old_memory_is_told_apart() -> None:
    old = [(10, 20), (30, 40)]
    assert list(huge_pages._without([(5, 50), (60, 70)], old)) == [
        (5, 10),
        (20, 30),
        (40, 50),
        (60, 70),
    ]
    assert list(huge_pages._without([(10, 20), (30, 45)], old)) == [(40, 45)]
