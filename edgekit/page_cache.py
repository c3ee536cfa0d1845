"""What of a file the kernel holds in memory, and how to make it forget.

Knows files and pages; never what is in them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def drop_from_page_cache(path: Path) -> str | None:
    """Let the kernel forget a file, so that the next read comes from the disk.

    Returns why it did not; None when the file is gone from memory.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        cached = share_in_page_cache(descriptor)
    except (OSError, AttributeError) as error:
        return f"the page cache cannot be emptied or looked into here ({error})"
    finally:
        os.close(descriptor)
    if cached:
        return f"the kernel kept the file in memory ({cached:.0%} of it)"
    return None


def share_in_page_cache(descriptor: int) -> float:
    """The part, 0 to 1, of an open file's pages that can be read without waiting for the disk.

    1 for a file of another user, of which the kernel says nothing (mincore(2)). Asking by a read
    that must not wait would start the kernel's reading ahead, and so bring the file back.
    """
    size = os.fstat(descriptor).st_size
    if not size:
        return 0.0
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), resident
        )
        del start  # it holds the mapping open
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return sum(page & 1 for page in resident) / pages
