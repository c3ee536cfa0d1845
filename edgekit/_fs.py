"""Files that are either whole or absent: staging, commit, hashing, containment, free space.

The only place that writes final paths. Knows nothing of what the files mean.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from edgekit.errors import ExportError, OutOfSpaceError, UnsafePathError, UsageError

_CHUNK = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces; ``on_bytes`` hears each piece's length."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            if on_bytes:
                on_bytes(len(piece))
    return digest.hexdigest()


def contained(root: Path, name: str) -> Path:
    """The path of ``name`` below ``root``.

    Raises UnsafePathError for absolute names, ``..``, backslashes, NUL, and for links: nothing
    below ``root`` on the way to ``name`` may be a symlink, for a link can be swapped later.
    """
    pure = PurePosixPath(name)
    bad = (
        not name
        or "\\" in name
        or "\0" in name
        or pure.is_absolute()
        or ":" in name
        or any(part in ("..", ".") for part in name.split("/"))
        or "" in name.split("/")
    )
    if bad:
        raise UnsafePathError(f"unsafe path {name!r} leaves its folder")
    path = root
    for part in pure.parts:
        path = path / part
        if os.path.islink(path):
            raise UnsafePathError(f"{name!r} passes through a symbolic link")
    return path


def fsync_dir(path: Path) -> None:
    """Make renames inside ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_dir(Path(folder))


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a small file so that a reader sees the old bytes or the new ones, never a mixture.

    ``mode`` holds from the first byte on, less the umask: 0o600 for what nobody else may read.
    """
    write_pieces(path, [data], mode=mode)


def write_pieces(path: Path, pieces: Iterable[bytes], *, mode: int = 0o666) -> None:
    """``write_atomic`` for a file that is too large to hold."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            made = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(made, "wb") as file:
                for piece in pieces:
                    file.write(piece)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def publish(partial: Path, path: Path) -> None:
    """Give a finished file its final name, durably and in one step."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(partial, path)
    fsync_dir(path.parent)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's words for a bad or full disk into ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpaceError(
                f"the disk filled up while writing {path}", hint="free some space and run it again"
            ) from error
        where = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
        raise ExportError(
            f"cannot write {path}: {error.strerror}{where}", hint="choose another place"
        ) from error


def is_full(error: BaseException) -> bool:
    """Whether the system refused for want of room, however a library wrapped that."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        found = found.__cause__ or found.__context__
    return False


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user can still write on the disk that holds (or will hold) ``path``."""
    existing = path.absolute()  # os.path, for pathlib raises where a folder may not be looked into
    while not os.path.exists(existing):
        existing = existing.parent
    stats = os.statvfs(existing)
    return stats.f_bavail * stats.f_frsize


def require_space(path: Path, needed_bytes: int) -> None:
    """Raise OutOfSpaceError before the work starts if ``needed_bytes`` do not fit."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise OutOfSpaceError(
            f"{path.parent} has {free / 1e6:.1f} MB free,"
            f" the work needs {needed_bytes / 1e6:.1f} MB",
            hint="free some space, or choose another --out",
        )


def _exchange(left: Path, right: Path) -> bool:
    """Swap two paths in one step (Linux renameat2); False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    done: int = libc.renameat2(
        _AT_FDCWD, os.fsencode(left), _AT_FDCWD, os.fsencode(right), _RENAME_EXCHANGE
    )
    return done == 0


def _recover(out: Path) -> None:
    """Finish what a killed commit left: the old folder moved away, the new one not yet in place."""
    replaced = out.with_name(out.name + ".replaced")
    if replaced.is_dir():
        if out.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, out)


def _commit(partial: Path, out: Path) -> None:
    _fsync_tree(partial)
    if not out.exists():
        os.rename(partial, out)
    elif _exchange(partial, out):
        shutil.rmtree(partial)
    else:
        replaced = out.with_name(out.name + ".replaced")
        os.rename(out, replaced)
        os.rename(partial, out)
        shutil.rmtree(replaced)
    fsync_dir(out.parent)


@contextmanager
def staged(out: Path, *, owns: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder ``<out>.partial`` to fill, which becomes ``out`` in one step when the block ends.

    If the block raises, the folder goes and an earlier ``out`` stays as it was. What a killed run
    left behind is removed; a second run at the same time is refused. ``owns(out)`` must say that an
    existing ``out`` is ours to replace, else UsageError: nobody's folder is ever overwritten.
    """
    out = out.absolute()
    if not out.name:
        raise UsageError(f"{out} cannot be an output")
    partial = out.with_name(out.name + ".partial")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out):
            _recover(out)
            if os.path.islink(out) or (os.path.exists(out) and not owns(out)):
                raise UsageError(
                    f"{out} exists and was not made by edgekit",
                    hint="choose another --out, or move it away",
                )
            with _fresh(partial):
                yield partial
                _commit(partial, out)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A folder ``<path>.partial`` to work in, which goes when the block ends.

    What a killed run left behind is removed first; a second run at the same time is refused.
    """
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path), _fresh(partial):
            yield partial


@contextmanager
def _fresh(folder: Path) -> Iterator[None]:
    """Make ``folder`` anew, and remove it in the end if it is still there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold ``.<out>.lock``; the kernel frees it when the process dies, however it dies.

    Raises UsageError while another process holds it.
    """
    lock = out.with_name(f".{out.name}.lock")
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UsageError(
                f"another edgekit is writing {out}", hint="wait for it, or choose another --out"
            ) from None
        # The holder before us removed the name while we opened it: then we locked a dead file.
        if lock.exists() and os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
            break
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours, whatever of it is still there."""
    shutil.rmtree(folder, ignore_errors=True)


def home(kind: str) -> Path:
    """The user's own folder for ``kind`` ("config", "cache" or "state").

    Below ``EDGEKIT_HOME`` when that is set, else where the XDG base directory specification says.
    """
    if own := os.environ.get("EDGEKIT_HOME"):
        return Path(own) / kind
    variable, default = {
        "config": ("XDG_CONFIG_HOME", ".config"),
        "cache": ("XDG_CACHE_HOME", ".cache"),
        "state": ("XDG_STATE_HOME", ".local/state"),
    }[kind]
    return Path(os.environ.get(variable) or Path.home() / default) / "edgekit"
