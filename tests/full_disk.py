"""Disks so small that they fill up: real ones, in memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disks(place: Path) -> Iterator[Callable[[int], Path]]:
    """A function that mounts a tmpfs of so many bytes below ``place``; all go in the end."""
    mounted: list[Path] = []

    def mount(size_bytes: int) -> Path:
        folder = place / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)],
            capture_output=True,
        )
        if done.returncode:
            pytest.skip("mounting a tmpfs needs root")
        mounted.append(folder)
        return folder

    try:
        yield mount
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def hog(disk: Path, size_bytes: int) -> None:
    """Another writer takes ``size_bytes`` of the disk."""
    with (disk / "hog").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
