"""The first load of a file: in a child process, where it may crash.

Must never run the engine in this process; remembers which files have passed. Files of edgekit's own
making are no exception, for anybody can write a manifest that fits its files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit import _fs, _proc
from edgekit.runtime import LoadParams
from edgekit.runtimes import cache_file

_TIMEOUT_S = 60
_SLOWEST_DISK_BYTES_S = 20_000_000  # half of what a slow SD card reads
# The mapped file, a repacked copy of its weights, and one more for what the header may hide.
_FILE_COPIES = 3
_ENGINE_BYTES = 4 << 30


def check(path: Path, adapters: Sequence[Path]) -> None:
    """Load a GGUF and decode one token in a child, unless these very files have passed before.

    Raises EngineCrashedError, DeadlineError, LoadError: then the file is not to be loaded here.
    """
    from edgekit.llama_library import version

    arguments = {
        "path": str(path.absolute()),
        "adapters": [str(file.absolute()) for file in adapters],
    }
    pass_once([path, *adapters], "edgekit.runtimes.first_load:attempt", arguments, version())


def pass_once(files: Sequence[Path], attempt: str, arguments: dict[str, Any], engine: str) -> None:
    """Call ``attempt`` ("module:function") with ``arguments`` in a child, unless it has passed with
    these files and this version of the engine before. The first of ``files`` is the model.

    Raises EngineCrashedError, DeadlineError, and what the function raises.
    """
    passed = _fs.home("cache") / "first-load" / _fingerprint(files, engine)
    if os.path.exists(passed):
        return
    size_bytes = sum(file.stat().st_size for file in files)
    _proc.call(
        attempt,
        arguments,
        timeout_s=_TIMEOUT_S + size_bytes // _SLOWEST_DISK_BYTES_S,
        memory_bytes=_FILE_COPIES * size_bytes + _ENGINE_BYTES,
        what=f"loading {files[0]} in a child process",
    )
    cache_file.write(passed, b"")


def _fingerprint(files: Sequence[Path], engine: str) -> str:
    """Name, size, time and place of the files: a changed file has another one."""
    facts = [engine]
    for file in files:
        status = file.stat()
        facts += [str(file.resolve()), str(status.st_size), str(status.st_mtime_ns)]
        facts += [str(status.st_ino), str(status.st_dev), str(status.st_ctime_ns)]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


def attempt(path: str, adapters: list[str]) -> None:
    """In the child: load, tokenise, decode one token, and render every token once."""
    from edgekit.formats import gguf
    from edgekit.runtimes.llama_engine import Engine

    params = LoadParams(
        n_ctx=32, n_batch=8, n_gpu_layers=0, adapters=tuple((Path(file), 1.0) for file in adapters)
    )
    engine = Engine(Path(path), gguf.read(Path(path)), params, threads=(1, 1))
    tokens = engine.tokenize("Hello, 世界 <|im_end|>", special=True) or [0]
    engine.decode(tokens[:1], 0)
    engine.logits()
    for token in range(engine.n_vocab):
        engine.piece(token)
