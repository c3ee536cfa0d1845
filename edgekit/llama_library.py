"""The one door to libllama: loads it and its CPU backends once per process, and keeps its log.

Exporters quantize with it and runtimes generate with it; it knows neither, and no model. Imports
the engine only inside ``library()``.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgekit.errors import LoadError, MissingExtraError

_log = logging.getLogger("edgekit.llama")
_recent: deque[str] = deque(maxlen=40)
_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}  # GGML_LOG_LEVEL_*


_listeners: list[Callable[[str], None]] = []
_unfinished = ""


def _on_log(level: int, text: bytes, _user_data: Any) -> None:
    """The engine logs some lines in pieces: keep them until the line ends."""
    global _unfinished
    *lines, _unfinished = (_unfinished + text.decode("utf-8", "replace")).split("\n")
    for line in lines:
        if not line.strip(". "):
            continue
        _recent.append(line)
        _log.log(_LEVELS.get(level, logging.DEBUG), "%s", line)
        for listener in _listeners:
            listener(line)


@contextmanager
def listen(listener: Callable[[str], None]) -> Iterator[None]:
    """Hear every line that the engine logs inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@functools.cache
def library() -> Any:
    """The module ``llama_cpp.llama_cpp`` (ctypes bindings), with its backends loaded.

    A wheel with run-time CPU variants holds one backend per ISA level, and nobody loads the best
    one by itself: without this call every model load fails.
    Raises MissingExtraError without the package, LoadError when no backend suits this CPU.
    """
    try:
        from llama_cpp import llama_cpp
    except ImportError:
        raise MissingExtraError("llama", missing="llama-cpp-python") from None
    llama_cpp._edgekit_log = llama_cpp.llama_log_callback(_on_log)  # keep the callback alive
    llama_cpp.llama_log_set(llama_cpp._edgekit_log, None)
    ggml = ggml_library()
    # A build with one fixed CPU backend has it registered already.
    if ggml.ggml_backend_reg_count() == 0:
        ggml.ggml_backend_load_all_from_path(str(library_folder()).encode())
    llama_cpp.llama_backend_init()
    if ggml.ggml_backend_reg_count() == 0:
        raise LoadError(
            "no CPU backend of llama.cpp could be loaded",
            hint="reinstall llama-cpp-python with scripts/build",
        )
    return llama_cpp


def library_folder() -> Path:
    """Where the shared libraries of llama-cpp-python lie."""
    import llama_cpp

    return Path(llama_cpp.__file__).parent / "lib"


@functools.cache
def ggml_library() -> ctypes.CDLL:
    """libggml, the very instance that libllama uses, with the calls edgekit needs declared."""
    ggml = ctypes.CDLL(str(library_folder() / "libggml.so"))
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_load_all_from_path.restype = None
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    return ggml


def system_info() -> str:
    """The ISA features that the loaded CPU backend was compiled for, in llama.cpp's own words."""
    text: bytes = library().llama_print_system_info()
    return text.decode()


def backend_file() -> str | None:
    """File name of the CPU backend in use (``libggml-cpu-zen4.so``); None for a fixed build."""
    library()
    with open("/proc/self/maps") as maps:
        for line in maps:
            name = line.rstrip().rpartition("/")[2]
            if name.startswith("libggml-cpu"):
                return name
    return None


def recent_log() -> list[str]:
    """The engine's last lines, newest last: the reason behind a failed load."""
    return list(_recent)
