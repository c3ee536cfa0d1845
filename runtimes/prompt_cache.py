"""Keeps the last prompt's KV cells in a file, so that a later run need not read it again.

Must never hand bytes to the engine that this user's own edgekit did not write: the engine trusts a
state blindly. So a file carries a keyed hash; what does not fit it is ignored and written anew.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import struct
from pathlib import Path

import numpy as np

from edgekit import _fs, llama_library
from edgekit.errors import UsageError
from edgekit.runtime import LoadParams
from edgekit.runtimes import cache_file
from edgekit.runtimes.token_engine import Logits

_MAGIC = b"edgekit prompt 1"
_HEAD = struct.Struct("<16s32s32sII")  # magic, keyed hash, identity, tokens, logits
_SAMPLES = 64
_SAMPLE_BYTES = 1 << 14
_MAX_BYTES = 8 << 30


class PromptCache:
    """One cache file for one model with one set of load parameters."""

    def __init__(self, file: Path, model: Path, params: LoadParams) -> None:
        if os.path.isdir(file):
            raise UsageError(f"the prompt cache {file} is a folder")
        if not _ours(file):
            raise UsageError(f"{file} is no prompt cache of edgekit, and would be overwritten")
        self._file = file
        self._identity = _identity(model, params)

    def load(self, n_vocab: int) -> tuple[list[int], Logits, bytes] | None:
        """Tokens, logits of their end, engine state; None for no, a foreign or a spoilt file."""
        try:
            if self._file.stat().st_size > _MAX_BYTES:
                return None
            raw = self._file.read_bytes()
        except OSError:
            return None
        if len(raw) < _HEAD.size:
            return None
        magic, claimed, identity, n_tokens, n_logits = _HEAD.unpack_from(raw)
        if magic != _MAGIC or identity != self._identity or n_logits != n_vocab:
            return None
        key = _known_key()
        if key is None or not hmac.compare_digest(claimed, hmac.digest(key, raw[48:], "sha256")):
            return None
        tokens = np.frombuffer(raw, np.int32, n_tokens, _HEAD.size)
        logits = np.frombuffer(raw, np.float32, n_logits, _HEAD.size + 4 * n_tokens)
        return tokens.tolist(), logits.copy(), raw[_HEAD.size + 4 * (n_tokens + n_logits) :]

    def save(self, tokens: list[int], logits: Logits, state: bytes) -> None:
        """Replace the file, whole or not at all; a file that cannot be written is a warning."""
        key = _known_key() or _new_key()
        if key is None:
            return
        body = b"".join(
            [
                _HEAD.pack(b"", b"", self._identity, len(tokens), len(logits))[48:],
                np.array(tokens, np.int32).tobytes(),
                logits.astype(np.float32).tobytes(),
                state,
            ]
        )
        whole = _MAGIC + hmac.digest(key, body, "sha256") + body
        cache_file.write(self._file, whole, level=logging.WARNING)


def _ours(file: Path) -> bool:
    """Whether nothing of somebody else's is lost when ``file`` is replaced."""
    try:
        with open(file, "rb") as found:
            head = found.read(len(_MAGIC))
    except OSError:
        return True
    return head in (b"", _MAGIC)


def _key_file() -> Path:
    return _fs.home("state") / "prompt-cache.key"


def _known_key() -> bytes | None:
    """The key of the HMAC-SHA256 in every file of this user; only this user can read it."""
    try:
        return _key_file().read_bytes() or None
    except OSError:
        return None


def _new_key() -> bytes | None:
    """A key for all files to come; None, and a warning, where it cannot be kept."""
    key = secrets.token_bytes(32)
    kept = cache_file.write(_key_file(), key, level=logging.WARNING, mode=0o600)
    return key if kept else None


def _identity(model: Path, params: LoadParams) -> bytes:
    """A hash over whatever changes a KV cell: files, cache type, attention, engine."""
    digest = hashlib.sha256(llama_library.version().encode())
    digest.update((llama_library.backend_file() or "").encode())
    digest.update(f"{params.kv_type} {params.flash_attention} {params.n_batch}".encode())
    for file, scale in [(model, 1.0), *params.adapters]:
        digest.update(struct.pack("<d", scale))
        _sample(file, digest)
    return digest.digest()


def _sample(file: Path, digest: hashlib._Hash) -> None:
    """The size and evenly spread pieces of a file: other weights show in any of them."""
    size = file.stat().st_size
    digest.update(struct.pack("<Q", size))
    with file.open("rb") as source:
        for i in range(_SAMPLES):
            source.seek(i * size // _SAMPLES)
            digest.update(source.read(_SAMPLE_BYTES))
