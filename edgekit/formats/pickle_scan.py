"""Knows how pickled and zipped weights begin, and by which names they go.

Must never unpickle anything: it looks at a name and four bytes.
"""

from __future__ import annotations

from pathlib import Path

from edgekit.formats.foreign import Cursor, Malformed, opened

# `torch.save`, `joblib`, `numpy.save` of objects, Keras and NeMo files can all hold a pickle.
SUFFIXES = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".h5", ".hdf5"}
    | {".keras", ".mar", ".nemo", ".npy", ".npz", ".msgpack", ".t7", ".zip", ".tar"}
)

_ZIP = b"PK\x03\x04"
_PROTOCOL = 0x80  # the opcode that begins every binary pickle, followed by its protocol


def named_like_pickle(name: str) -> bool:
    """Whether a file of this name usually holds pickled weights."""
    return Path(name).suffix.lower() in SUFFIXES


def begins_like_pickle(path: Path) -> bool:
    """Whether the file's first bytes are those of a pickle, or of a zip that may hold one.

    Raises SourceError if ``path`` is no readable file.
    """
    with opened(path) as (file, size):
        try:
            head = Cursor(file, size).take(min(size, len(_ZIP)))
        except Malformed:
            return False
    return head == _ZIP or (len(head) > 1 and head[0] == _PROTOCOL and head[1] <= 5)
