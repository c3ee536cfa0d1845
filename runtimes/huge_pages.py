"""Large pages for the memory that an engine takes for weights.

Knows the kernel's pages; never an engine. Every weight is read once for each token, and with pages
of 4 KiB the processor looks up half a million addresses on the way, twice where the machine is
virtual. Most distributions give pages of 2 MiB to those who ask ("madvise"), and C libraries do
not ask (https://docs.kernel.org/admin-guide/mm/transhuge.html).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
_MAPS = Path("/proc/self/maps")
# Start, end and rights of a mapping that belongs to no file.
_ANONYMOUS = re.compile(r"(?m)^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(?:\[heap\])?$")


class HugePages:
    """Remembers what is mapped when it is made; ``advise`` or ``collapse`` asks once for what came
    since.
    """

    def __init__(self) -> None:
        self._size = _huge_page_bytes()
        self._before = _mappings() if self._size else []

    def advise(self) -> int:
        """For an engine that is about to write its weights: ask for large pages in every mapping
        that is new. Bytes asked for.

        0 where the kernel has none, or gives them to nobody. What it cannot give, it leaves small.
        """
        return sum(end - start for start, end in self._new() if _ask(start, end, _MADV_HUGEPAGE))

    def collapse(self) -> int:
        """For an engine that has written its weights: have them moved into large pages at once.
        Bytes of the mappings that were.

        0 as with ``advise``; kernels before 6.1 move them in time, or not at all.
        """
        moved = 0
        for start, end in self._new():
            if _ask(start, end, _MADV_HUGEPAGE) and _ask(start, end, _MADV_COLLAPSE):
                moved += end - start
        return moved

    def _new(self) -> Iterator[tuple[int, int]]:
        """The large pages within what is mapped now and was not before, as ranges of addresses."""
        if not self._size:
            return
        size, self._size = self._size, 0
        for start, end in _without(_mappings(), self._before):
            start, end = -(-start // size) * size, end // size * size
            if start < end:
                yield start, end


def _ask(start: int, end: int, advice: int) -> bool:
    size = ctypes.c_size_t(end - start)
    return not ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, advice)


def _huge_page_bytes() -> int:
    """The size of a large page; 0 where a process cannot ask for one."""
    try:
        if "[never]" in (_SETTINGS / "enabled").read_text():
            return 0
        return int((_SETTINGS / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0


def _mappings() -> list[tuple[int, int]]:
    try:
        found = _ANONYMOUS.findall(_MAPS.read_text())
    except OSError:
        return []
    return [(int(start, 16), int(end, 16)) for start, end in found]


def _without(
    ranges: list[tuple[int, int]], old: list[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """What of ``ranges`` lies in none of ``old``, both in order; the kernel joins neighbours."""
    for start, end in ranges:
        for old_start, old_end in old:
            if old_end <= start or old_start >= end:
                continue
            if start < old_start:
                yield start, old_start
            start = old_end
        if start < end:
            yield start, end
