"""Signals while the engine works: it stops at once, and every handler runs, once, afterwards."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.runtime import Session
from edgekit.runtimes.signal_flag import SignalFlag


def test_ctrl_c_stops_a_long_prompt_at_once_and_the_session_lives_on(smollm2_gguf: Path) -> None:
    with edgekit.load(smollm2_gguf, n_ctx=4096, n_batch=2048, n_threads=1) as session:
        whole = session.complete("hello", max_tokens=3).text
        timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            session.complete("word " * 4000, max_tokens=3)
        assert time.monotonic() - started < 5
        timer.join()
        assert session.complete("hello", max_tokens=3).text == whole


@pytest.mark.parametrize("raises", [True, False])
def test_any_signal_of_a_program_is_handled_while_a_long_prompt_is_read(
    smollm2_gguf: Path, raises: bool
) -> None:
    at: list[float] = []

    def handler(*_: object) -> None:
        at.append(time.monotonic())
        if raises:
            raise TimeoutError("too late")

    def long(session: Session) -> str:
        return session.complete("word " * (4000 if raises else 1000), max_tokens=3).text

    with edgekit.load(smollm2_gguf, n_ctx=4096, n_batch=2048, n_threads=1) as session:
        whole = session.complete("hello", max_tokens=3).text
        expected = "" if raises else long(session)
        session.reset()
        old = signal.signal(signal.SIGUSR1, handler)
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        started = time.monotonic()
        try:
            if raises:
                with pytest.raises(TimeoutError, match="too late"):
                    long(session)
            else:
                assert long(session) == expected
        finally:
            signal.signal(signal.SIGUSR1, old)
        assert len(at) == 1
        assert at[0] - started < 5
        assert session.complete("hello", max_tokens=3).text == whole


def test_an_event_loop_still_hears_of_a_signal_that_came_meanwhile(smollm2_gguf: Path) -> None:
    mine, other = socket.socketpair()
    mine.setblocking(False)
    other.setblocking(False)
    old = signal.signal(signal.SIGUSR1, lambda *_: None)
    old_file = signal.set_wakeup_fd(mine.fileno())
    try:
        with edgekit.load(smollm2_gguf, n_ctx=2048, n_threads=1) as session:
            threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR1]).start()
            session.complete("word " * 1000, max_tokens=1)
        assert other.recv(16) == bytes([signal.SIGUSR1])
        assert signal.set_wakeup_fd(old_file) == mine.fileno()
    finally:
        signal.set_wakeup_fd(old_file)
        signal.signal(signal.SIGUSR1, old)
        mine.close()
        other.close()


def test_a_signal_during_a_call_into_the_engine_is_delivered_after_it() -> None:
    # Raised inside one of the engine's callbacks it would be printed and lost.
    seen: list[list[int]] = []
    with pytest.raises(KeyboardInterrupt), SignalFlag().watching() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        seen.append(list(noted))
    assert seen == [[signal.SIGINT]]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_stops_a_load(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.llama_library import libllama

    engine = libllama()
    load_from_file = engine.llama_model_load_from_file

    def load_and_interrupt(path: bytes, params: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        found = load_from_file(path, params)
        assert not found, "the engine went on loading"
        return found

    monkeypatch.setattr(engine, "llama_model_load_from_file", load_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        edgekit.load(smollm2_gguf, n_ctx=64, n_threads=1)
