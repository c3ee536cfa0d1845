"""What a GGUF file does when it is tried: token ids of texts, a greedy text, a race with another.

Must never judge what it sees. Only for children of ``_proc.call``: the files may crash the engine.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from edgekit import llama_library
from edgekit.errors import InferenceError, LoadError
from edgekit.formats import gguf
from edgekit.runtime import LoadParams
from edgekit.runtimes import token_trial
from edgekit.runtimes.llama_bencher import LlamaBencher
from edgekit.runtimes.llama_engine import Engine
from edgekit.runtimes.race import run
from edgekit.runtimes.threads import first_guess

_PIECE_BYTES = 1 << 12
_N_CTX = 256


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
    """What ``token_trial.complete`` answers."""
    params = LoadParams(
        n_ctx=_n_ctx(path),
        n_gpu_layers=0,
        adapters=tuple((Path(file), 1.0) for file in adapters),
    )
    engine = Engine(Path(path), gguf.read(Path(path)), params, threads=first_guess())
    return token_trial.complete(engine, prompt, n_tokens)


def race(paths: list[str], n_prompt: int, n_gen: int, rounds: int, budget_s: float) -> Any:
    """The race of ``race.run`` between GGUF files."""
    n_prompt = min(n_prompt, min(map(_n_ctx, paths)) - n_gen)
    threads = first_guess()[0]
    benches = [LlamaBencher(Path(path), n_ctx=n_prompt + n_gen, threads=threads) for path in paths]
    return run(benches, n_prompt, n_gen, rounds, budget_s) | {"threads": threads}


def _n_ctx(path: str) -> int:
    """Enough for a trial, and no more than the model was trained for."""
    header = gguf.read(Path(path))
    trained = header.metadata.get(f"{header.architecture}.context_length", _N_CTX)
    return min(_N_CTX + 64, int(trained))
