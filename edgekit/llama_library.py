"""The one door to libllama: loads it and its CPU backends once per process, and keeps its log.

Exporters quantize with it and runtimes generate with it; it knows neither, and no model. Imports
the engine only inside ``libllama()``.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import LoadError, MissingExtraError

_log = logging.getLogger("edgekit.llama")
_log.addHandler(logging.NullHandler())
_recent: deque[str] = deque(maxlen=40)
_LEVELS = {2: logging.DEBUG, 3: logging.WARNING, 4: logging.ERROR}  # GGML_LOG_LEVEL_*
_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU


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
def libllama() -> Any:
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
        ggml.ggml_backend_load_all_from_path(str(libllama_folder()).encode())
    llama_cpp.llama_backend_init()
    if ggml.ggml_backend_reg_count() == 0:
        raise LoadError(
            "no CPU backend of llama.cpp could be loaded",
            hint="reinstall llama-cpp-python with scripts/build",
        )
    return llama_cpp


def libllama_folder() -> Path:
    """Where the shared libraries of llama-cpp-python lie."""
    import llama_cpp

    return Path(llama_cpp.__file__).parent / "lib"


@functools.cache
def ggml_library() -> ctypes.CDLL:
    """libggml, the very instance that libllama uses, with the calls edgekit needs declared."""
    ggml = ctypes.CDLL(str(libllama_folder() / "libggml.so"))
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_load_all_from_path.restype = None
    ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
    return ggml


class _ThreadpoolParams(ctypes.Structure):
    """``ggml_threadpool_params`` of ggml.h."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class Threadpools:
    """Threads that stay alive between decodes: one pool for decode, one for prefill.

    Without them the engine starts and ends its threads for every single token.
    """

    def __init__(self, decode: int, prefill: int) -> None:
        self._free = _cpu_function(b"ggml_threadpool_free", None)
        self._pools = [_new_pool(decode, paused=False)]
        if prefill != decode:
            self._pools.append(_new_pool(prefill, paused=True))

    def attach(self, context: Any) -> None:
        """Let ``context`` compute with these threads."""
        function = libllama()._lib.llama_attach_threadpool
        function.argtypes = [ctypes.c_void_p] * 3
        function.restype = None
        function(context, self._pools[0], self._pools[-1])

    def close(self) -> None:
        """End the threads. No context may still be attached."""
        for pool in self._pools:
            self._free(pool)
        self._pools = []


def _new_pool(n_threads: int, *, paused: bool) -> Any:
    params = _ThreadpoolParams()
    base = ctypes.CDLL(str(libllama_folder() / "libggml-base.so"))
    init = base.ggml_threadpool_params_init
    init.argtypes = [ctypes.c_void_p, ctypes.c_int]
    init.restype = None
    init(ctypes.byref(params), n_threads)
    params.paused = paused
    return _cpu_function(b"ggml_threadpool_new", ctypes.c_void_p)(ctypes.byref(params))


def _cpu_function(name: bytes, result: Any) -> Any:
    """A function of one pointer that lives in the CPU backend, which is loaded by name."""
    ggml = ggml_library()
    ggml.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    base = ctypes.CDLL(str(libllama_folder() / "libggml-base.so"))
    find = base.ggml_backend_reg_get_proc_address
    find.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    find.restype = ctypes.c_void_p
    address = find(ggml.ggml_backend_reg_by_name(b"CPU"), name)
    if not address:
        raise LoadError("the CPU backend of llama.cpp is not the one this edgekit knows")
    return ctypes.CFUNCTYPE(result, ctypes.c_void_p)(address)


@dataclass(frozen=True)
class Card:
    """A graphics card that the engine can use."""

    name: str
    free_bytes: int
    total_bytes: int


def cards() -> list[Card]:
    """The graphics cards of this machine for which the engine has a backend."""
    libllama()
    ggml = ggml_library()
    base = ctypes.CDLL(str(libllama_folder() / "libggml-base.so"))
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_description.restype = ctypes.c_char_p
    base.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p] * 3
    base.ggml_backend_dev_memory.restype = None
    found = []
    for i in range(ggml.ggml_backend_dev_count()):
        device = ggml.ggml_backend_dev_get(i)
        if base.ggml_backend_dev_type(device) == _GPU:
            free, total = ctypes.c_size_t(), ctypes.c_size_t()
            base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            name = base.ggml_backend_dev_description(device).decode("utf-8", "replace")
            found.append(Card(name, free.value, total.value))
    return found


def free_gpu_bytes() -> int:
    """Free memory of the graphics cards that the engine can use; 0 without any."""
    return sum(card.free_bytes for card in cards())


def version() -> str:
    """The installed llama-cpp-python."""
    from importlib.metadata import version

    return version("llama-cpp-python")


def system_info() -> str:
    """The ISA features that the loaded CPU backend was compiled for, in llama.cpp's own words."""
    text: bytes = libllama().llama_print_system_info()
    return text.decode()


def backend_file() -> str | None:
    """File name of the CPU backend in use (``libggml-cpu-zen4.so``); None for a fixed build."""
    libllama()
    with open("/proc/self/maps") as maps:
        for line in maps:
            name = line.rstrip().rpartition("/")[2]
            if name.startswith("libggml-cpu"):
                return name
    return None


def recent_log() -> list[str]:
    """The engine's last lines, newest last: the reason behind a failed load."""
    return list(_recent)
