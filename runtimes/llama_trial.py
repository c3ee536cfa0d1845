"""What a GGUF file does when it is tried: token ids of texts, a greedy text, a race with another.

Must never judge what it sees. Only for children of ``_proc.call``: the files may crash the engine.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import _proc, llama_library, machine, telemetry
from edgekit.errors import InferenceError, LoadError
from edgekit.formats import gguf
from edgekit.report import BUSY_SHARE, BUSY_STEAL
from edgekit.runtime import LoadParams
from edgekit.runtimes.llama_bencher import LlamaBencher
from edgekit.runtimes.llama_engine import Engine
from edgekit.runtimes.threads import first_guess

_PIECE_BYTES = 1 << 12
_N_CTX = 256
_FEW = 16  # tokens of a prompt
MIN_ROUNDS = 3


def tokens(path: str, texts: list[str]) -> dict[str, Any]:
    """The ids of every text, three ways, and the texts of the tokens that chat templates name.

    "plain": control tokens written out are text. "special": they are control tokens. "whole": the
    same with what the model puts around a text. Only the vocabulary is loaded.
    """
    llama = llama_library.libllama()
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise LoadError(f"cannot load the vocabulary of {path}")
    vocabulary = llama.llama_model_get_vocab(model)

    def ids(text: str, around: bool, special: bool) -> list[int]:
        raw = text.encode()
        room = len(raw) + 8
        buffer = (ctypes.c_int32 * room)()
        count = llama.llama_tokenize(vocabulary, raw, len(raw), buffer, room, around, special)
        if count < 0:
            raise InferenceError(f"the engine could not tokenise {text[:40]!r}")
        return buffer[:count]

    def written(token: int) -> str:
        if token < 0:
            return ""
        buffer = ctypes.create_string_buffer(_PIECE_BYTES)
        length = llama.llama_token_to_piece(vocabulary, token, buffer, _PIECE_BYTES, 0, True)
        return buffer.raw[: max(0, length)].decode("utf-8", "replace")

    return {
        "plain": [ids(text, False, False) for text in texts],
        "special": [ids(text, False, True) for text in texts],
        "whole": [ids(text, True, True) for text in texts],
        "bos": written(llama.llama_vocab_bos(vocabulary)),
        "eos": written(llama.llama_vocab_eos(vocabulary)),
    }


def complete(path: str, adapters: list[str], prompt: str, n_tokens: int) -> dict[str, Any]:
    """A greedy answer of at most ``n_tokens``; "finite" is False at the first logit that is not."""
    params = LoadParams(
        n_ctx=_n_ctx(path),
        n_gpu_layers=0,
        adapters=tuple((Path(file), 1.0) for file in adapters),
    )
    engine = Engine(Path(path), gguf.read(Path(path)), params, threads=first_guess())
    fed = engine.tokenize(prompt, special=False)
    if engine.adds_bos or not fed:
        fed = [max(0, engine.bos), *fed]
    position = 0
    found: list[int] = []
    while len(found) < n_tokens:
        engine.decode(fed, position)
        logits = engine.logits()
        if not np.isfinite(logits).all():
            return {"finite": False, "text": "", "tokens": len(found)}
        position += len(fed)
        fed = [int(logits.argmax())]
        if engine.ends(fed[0]):
            break
        found += fed
    text = b"".join(map(engine.piece, found)).decode("utf-8", "replace")
    return {"finite": True, "text": text, "tokens": len(found)}


def race(paths: list[str], n_prompt: int, n_gen: int, rounds: int, budget_s: float) -> Any:
    """Seconds per token of reading a prompt, and of single steps, round by round.

    Each round times every file with ``n_prompt`` tokens and ``n_gen`` steps, fewer where MIN_ROUNDS
    would take more than ``budget_s``; who goes first changes. Ends after ``rounds`` rounds, or when
    ``budget_s`` is over and MIN_ROUNDS are done. Answers {"prefill": [[s, ...], ...], "decode":
    ...}, a list for each path, with "threads", "n_prompt", "n_gen", and "busy": whether others kept
    the machine working.
    """
    n_prompt = min(n_prompt, min(map(_n_ctx, paths)) - n_gen)
    threads = first_guess()[0]
    benches = [LlamaBencher(Path(path), n_ctx=n_prompt + n_gen, threads=threads) for path in paths]
    round_s = 0.0
    for bench in benches:
        bench.prefill(_FEW)  # touches all memory for the first time
        round_s += bench.prefill(_FEW) / _FEW * n_prompt
        round_s += sum(bench.decode(2)) / 2 * n_gen
    share = min(1.0, budget_s / MIN_ROUNDS / round_s)
    n_prompt, n_gen = max(_FEW, int(n_prompt * share)), max(2, int(n_gen * share))
    prefill: list[list[float]] = [[] for _ in paths]
    decode: list[list[float]] = [[] for _ in paths]
    counters, own_s = telemetry.counters(machine.root()), time.process_time()
    started = time.perf_counter()
    for turn in range(rounds):
        if turn >= MIN_ROUNDS and time.perf_counter() - started > budget_s:
            break
        for side in range(len(paths)) if turn % 2 else reversed(range(len(paths))):
            prefill[side].append(benches[side].prefill(n_prompt) / n_prompt)
            decode[side].append(sum(benches[side].decode(n_gen)) / n_gen)
        _proc.report([turn + 1, rounds])
    own_s = time.process_time() - own_s
    strain = telemetry.strain(counters, telemetry.counters(machine.root()), own_s)
    return {
        "prefill": prefill,
        "decode": decode,
        "threads": threads,
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "busy": (strain.others_share or 0) > BUSY_SHARE or (strain.steal_share or 0) > BUSY_STEAL,
    }


def _n_ctx(path: str) -> int:
    """Enough for a trial, and no more than the model was trained for."""
    header = gguf.read(Path(path))
    trained = header.metadata.get(f"{header.architecture}.context_length", _N_CTX)
    return min(_N_CTX + 64, int(trained))
