"""Weights that the engine lays out anew come to lie in large pages, where the kernel has them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

import edgekit
from edgekit.runtimes import huge_pages
from edgekit.runtimes.huge_pages import HugePages

_MIB = 1 << 20


def _in_huge_pages() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    return 0


needs_huge_pages = pytest.mark.skipif(
    not huge_pages._huge_page_bytes(), reason="this kernel gives no process large pages"
)


@needs_huge_pages
def test_new_memory_is_asked_for_once_and_old_memory_is_left_alone() -> None:
    old = mmap.mmap(-1, 8 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = HugePages()
    new = mmap.mmap(-1, 64 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = _in_huge_pages()
    assert pages.advise() >= 60 * _MIB, "its ends may lie inside a large page"
    assert pages.advise() == 0
    new.write(bytes(64 * _MIB))
    # The kernel gives what it has: without a whole large page free, it gives small ones.
    assert 0 <= _in_huge_pages() - before <= 66 * _MIB
    old.close()
    new.close()


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
