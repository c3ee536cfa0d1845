"""Fetches one pinned commit of a Hugging Face repository: only the files that count, each verified.

Knows the hub's metadata and nothing of what the files mean. Imports huggingface_hub only when a
download starts.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import quote

from edgekit import _fs, model_folder
from edgekit.errors import (
    ChecksumError,
    DownloadError,
    EdgekitError,
    MissingExtraError,
    UnsafeModelError,
    UnsafePathError,
)
from edgekit.formats.foreign import shown

_log = logging.getLogger(__name__)

DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_FILES = 10_000
_MAX_CONFIG_BYTES = 1 << 22
_API_TIMEOUT_S = 30.0
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


# progress(done_bytes, total_bytes), over all files of a download.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit. ``sha256`` is known for large files, ``blob_id`` (git) for all."""

    name: str
    size_bytes: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True)
class Snapshot:
    """A complete, verified copy of one commit."""

    path: Path
    commit: str


def fetch(
    repo: str, revision: str | None = None, *, on_progress: Progress | None = None
) -> Snapshot:
    """The folder of ``repo`` ("org/name") at ``revision`` (branch, tag or 40-digit commit).

    A commit that is already here is used without the network; for a branch or tag the hub is asked
    which commit it means now, and the last known answer is used when the hub cannot be reached.
    A broken download goes on where it stopped.

    Raises DownloadError (unreachable, unknown, gated), ChecksumError (the bad file is removed),
    OutOfSpaceError before the first byte, UnsafeModelError for file names that leave the folder and
    repositories that hold only pickles.
    """
    revision = revision or DEFAULT_REVISION
    cache = _fs.home("cache") / "hub" / repo.replace("/", "--")
    if _COMMIT.fullmatch(revision) and (cache / revision).is_dir():
        return Snapshot(cache / revision, revision)
    ref = cache / "refs" / quote(revision, safe="")
    try:
        commit, files = _list(repo, revision)
    except _Unreachable as error:
        commit = ref.read_text().strip() if ref.is_file() else ""
        if not (_COMMIT.fullmatch(commit) and (cache / commit).is_dir()):
            raise
        _log.warning("%s; using %s as of commit %s", error.message, repo, commit)
        return Snapshot(cache / commit, commit)
    if not (cache / commit).is_dir():
        _download(repo, commit, files, cache, on_progress)
    _fs.write_atomic(ref, commit.encode())
    return Snapshot(cache / commit, commit)


def fetch_config(repo: str, revision: str | None = None) -> bytes:
    """config.json of ``repo`` alone, verified: what a plan needs. Nothing is kept.

    Raises what ``fetch`` raises.
    """
    commit, files = _list(repo, revision or DEFAULT_REVISION)
    file = next((file for file in files if file.name == model_folder.CONFIG), None)
    if file is None or file.size_bytes > _MAX_CONFIG_BYTES:
        raise DownloadError(f"{repo} has no {model_folder.CONFIG} that can be read")
    work = _fs.home("cache") / "hub" / repo.replace("/", "--") / f"{commit}.config"
    with _fs.disk_errors(work), _fs.scratch(work) as folder:
        _fetch_file(repo, commit, file, folder, None)
        return (folder / file.name).read_bytes()


class _Unreachable(DownloadError):
    """The hub did not answer at all: an earlier copy may serve."""


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtraError("export", missing="huggingface-hub") from None
    return huggingface_hub


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    """The fence: whatever the hub's library raises leaves here as one of ours.

    Its HTTP client differs between releases, so the classes are told apart by the status code.
    """
    try:
        yield
    except (EdgekitError, KeyboardInterrupt):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
            raise  # for _fs.disk_errors
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind = type(error).__name__
        if status in (401, 403) or kind == "GatedRepoError":
            raise DownloadError(
                f"the hub refuses access to {repo} ({status}): it is private, gated or unknown",
                hint="accept the model's terms on its page and set HF_TOKEN to your access token",
            ) from error
        if kind == "RevisionNotFoundError":
            raise DownloadError(
                f"{repo} has no revision {shown(revision)}",
                hint="give a branch, a tag or a 40-digit commit",
            ) from error
        if status == 404:
            raise DownloadError(f"the hub has no model {repo}", hint="check the name") from error
        if status is not None and status < 500:
            raise DownloadError(f"the hub answered {status} for {repo}") from error
        raise _Unreachable(
            f"cannot reach {_endpoint()} for {repo} ({kind})",
            hint=f"there is no folder {repo} here; for a model of the hub check the network and"
            " HF_ENDPOINT, and run again: it goes on where it stopped",
        ) from error


def _list(repo: str, revision: str) -> tuple[str, list[RemoteFile]]:
    """The commit that ``revision`` means now, and the files of it that edgekit reads."""
    hub = _hub()
    with _hub_errors(repo, revision):
        api = hub.HfApi(endpoint=_endpoint(), library_name="edgekit")
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_API_TIMEOUT_S)
        commit = str(info.sha)
        siblings = list(info.siblings or ())
    if not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(revision) and commit != revision):
        raise DownloadError(f"the hub names the commit {shown(commit)} for {shown(revision)}")
    if len(siblings) > _MAX_FILES:
        raise DownloadError(f"{repo} has {len(siblings)} files, more than the {_MAX_FILES} allowed")
    names = [str(sibling.rfilename) for sibling in siblings]
    for name in names:
        try:
            _fs.contained(Path("snapshot"), name)
        except UnsafePathError:
            raise UnsafeModelError(
                f"{repo} has a file with the unsafe name {shown(name)}"
            ) from None
    files = [
        _remote(repo, sibling)
        for sibling in siblings
        if model_folder.wanted(str(sibling.rfilename))
    ]
    if not any(file.name.endswith(".safetensors") for file in files):
        model_folder.refuse_without_weights(repo, names)
    if len({file.name for file in files}) != len(files):
        raise DownloadError(f"{repo} lists a file twice")
    return commit, files


def _remote(repo: str, sibling: Any) -> RemoteFile:
    lfs, size, blob_id = sibling.lfs, sibling.size, sibling.blob_id
    sha256 = (lfs.get("sha256") if isinstance(lfs, dict) else lfs.sha256) if lfs else None
    whole = (
        isinstance(size, int)
        and size >= 0
        and re.fullmatch(r"[0-9a-f]{40}", str(blob_id))
        and (sha256 is None or re.fullmatch(r"[0-9a-f]{64}", str(sha256)))
    )
    if not whole:
        raise DownloadError(
            f"the hub gives no size and hash for {shown(sibling.rfilename)} of {repo}",
            hint="without them the file cannot be verified; check HF_ENDPOINT",
        )
    return RemoteFile(sibling.rfilename, size, sha256, blob_id)


def _download(
    repo: str,
    commit: str,
    files: list[RemoteFile],
    cache: Path,
    on_progress: Progress | None,
) -> None:
    """Fill ``<commit>.download``, which survives a break, and commit it as ``<commit>``.

    Staging the commit from the start also keeps a second download of it out.
    """
    work = cache / f"{commit}.download"
    total = sum(file.size_bytes for file in files)
    with _fs.disk_errors(work), _fs.staged(cache / commit, owns=lambda _: True) as snapshot:
        work.mkdir(exist_ok=True)
        missing = [file for file in files if not _whole(work, file).is_file()]
        missing_bytes = sum(file.size_bytes for file in missing)
        started_bytes = sum(_size(_partial(work, file)) for file in missing)
        _fs.require_space(work, missing_bytes - started_bytes)
        for file in missing:
            report = _Report(on_progress, total - missing_bytes, total) if on_progress else None
            _fetch_file(repo, commit, file, work, report)
            missing_bytes -= file.size_bytes
        for file in files:
            (snapshot / file.name).parent.mkdir(exist_ok=True)
            os.rename(_whole(work, file), snapshot / file.name)
        for leftover in work.iterdir():
            leftover.unlink()
        work.rmdir()


class _Report:
    """A file's share of the progress of all."""

    def __init__(self, on_progress: Progress, before_bytes: int, total_bytes: int) -> None:
        self._tell, self._before, self._total = on_progress, before_bytes, total_bytes

    def __call__(self, file_bytes: int) -> None:
        self._tell(self._before + file_bytes, self._total)


def _whole(work: Path, file: RemoteFile) -> Path:
    """Where a complete file waits: all of them flat, whatever folder they belong to."""
    return work / file.name.replace("/", "--")


def _partial(work: Path, file: RemoteFile) -> Path:
    whole = _whole(work, file)
    return whole.with_name(f"{whole.name}.{file.blob_id[:12]}.partial")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _fetch_file(
    repo: str, commit: str, file: RemoteFile, work: Path, report: Callable[[int], None] | None
) -> None:
    """Complete one file's partial copy, verify it, and give it its name."""
    hub = _hub()
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    partial = _partial(work, file)
    url = hub.hf_hub_url(repo, file.name, revision=commit, endpoint=_endpoint())
    headers = build_hf_headers(library_name="edgekit") | {"Accept-Encoding": "identity"}
    with partial.open("ab") as target, _hub_errors(repo, commit), suppress(_TooLong):
        if (start := target.tell()) < file.size_bytes:
            bounded = _Bounded(target, file.size_bytes, report)
            http_get(url, bounded, resume_size=start, headers=headers, tqdm_class=_NoBar)
    if not _matches(partial, file):
        partial.unlink()
        raise ChecksumError(
            f"{file.name} of {repo} is not the file that the hub describes",
            hint="run it again: the bad copy was removed",
        )
    os.replace(partial, _whole(work, file))


class _Bounded:
    """A file that takes ``limit`` bytes and no more, and tells how long it has become."""

    def __init__(
        self, file: BinaryIO, limit_bytes: int, report: Callable[[int], None] | None
    ) -> None:
        self._file, self._limit, self._report = file, limit_bytes, report
        self.tell, self.seek, self.truncate = file.tell, file.seek, file.truncate

    def write(self, data: bytes) -> int:
        room = self._limit - self._file.tell()
        # One byte too many is kept: it makes the verification fail without filling the disk.
        written = self._file.write(data[: max(room, 0) + 1])
        if self._report:
            self._report(self._file.tell())
        if written > room:
            raise _TooLong
        return written


class _TooLong(Exception):
    """The server sends more than it announced."""


class _NoBar:
    """Stands in for the library's own progress bar: progress is reported by ``_Bounded``."""

    def __init__(self, **_: Any) -> None:
        pass

    def update(self, _: float) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _matches(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size_bytes:
        return False
    if file.sha256:
        return _fs.sha256_file(path) == file.sha256
    # Git names a blob by the SHA-1 of a short header and the bytes; such files are small.
    blob = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
    with path.open("rb") as content:
        while piece := content.read(1 << 20):
            blob.update(piece)
    return blob.hexdigest() == file.blob_id


def check_repo_id(spec: str) -> bool:
    """Whether ``spec`` has the form of a hub id: ``org/name``."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    return bool(re.fullmatch(f"{part}/{part}", spec)) and ".." not in spec and "--" not in spec
