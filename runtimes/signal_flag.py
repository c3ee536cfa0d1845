"""Signals while a C library works: it hears of them at once, Python's handlers run afterwards.

Knows signals and nothing of engines. Python runs handlers only between bytecodes, and an engine may
work for minutes without any; what a handler raises inside one of its callbacks is lost. So handlers
only take note here, and run when the engine has come back.

How the engine hears of it without any Python: at once the interpreter writes the signal's number to
its wake-up file (https://docs.python.org/3/library/signal.html#signal.set_wakeup_fd). Here that
file is memory, and the engine's callback is ``strlen`` of it, a function of one pointer that every
C library has. A callback in Python, asked before each of a thousand operators, costs 1 to 2%.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import threading
from collections.abc import Iterator


class SignalFlag:
    """``ask`` (the address of a C function) of ``memory`` (an address) is 0 until a signal came."""

    def __init__(self) -> None:
        self._file = os.memfd_create("edgekit-signals")
        os.ftruncate(self._file, mmap.PAGESIZE)
        os.set_blocking(self._file, False)  # as Python demands of a wake-up file
        memory = mmap.mmap(self._file, mmap.PAGESIZE)
        self._bytes = (ctypes.c_char * mmap.PAGESIZE).from_buffer(memory)
        self.memory = ctypes.addressof(self._bytes)
        self.ask = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p).value or 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[int]]:
        """Inside the block note the signals that have handlers of Python's; behind it, handle them.

        Yields the list of those that came. It stays empty in a thread that is not the main one, for
        only that one hears of signals.
        """
        noted: list[int] = []
        if threading.current_thread() is not threading.main_thread():
            yield noted
            return
        handlers = {n: h for n in signal.valid_signals() if callable(h := signal.getsignal(n))}
        os.lseek(self._file, 0, os.SEEK_SET)
        ctypes.memset(self.memory, 0, len(self._bytes))
        for number in handlers:
            signal.signal(number, lambda number, _: noted.append(number))
        others = signal.set_wakeup_fd(self._file, warn_on_full_buffer=False)
        try:
            yield noted
        finally:
            signal.set_wakeup_fd(others)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for came in noted:
                signal.raise_signal(came)

    def close(self) -> None:
        """Give the memory's file back."""
        os.close(self._file)
