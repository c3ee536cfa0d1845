"""What an ONNX language model does when it is tried: token ids, a greedy text, a race.

Must never judge what it sees. Only for children of ``_proc.call``: the files may crash the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekit import language_model
from edgekit.formats import onnx
from edgekit.runtimes import token_trial
from edgekit.runtimes.hf_tokens import HfTokens
from edgekit.runtimes.ort_bencher import OrtBencher
from edgekit.runtimes.ort_engine import OrtEngine
from edgekit.runtimes.race import run
from edgekit.runtimes.threads import first_guess

_N_CTX = 320


def tokens(path: str, texts: list[str]) -> dict[str, Any]:
    """What ``llama_trial.tokens`` answers; only the files beside the model are read."""
    facts = language_model.beside(Path(path))
    tokenizer = HfTokens(Path(path).parent, facts)
    start = [facts.bos] if facts.adds_bos else []
    special = [tokenizer.tokenize(text, special=True) for text in texts]
    return {
        "plain": [tokenizer.tokenize(text, special=False) for text in texts],
        "special": special,
        "whole": [[*start, *ids] for ids in special],
        "bos": tokenizer.token_text(-1 if facts.bos is None else facts.bos),
        "eos": tokenizer.token_text(-1 if facts.eos is None else facts.eos),
    }


def complete(path: str, adapters: list[str], prompt: str, n_tokens: int) -> dict[str, Any]:
    """What ``token_trial.complete`` answers."""
    onnx.read(Path(path))
    n_ctx = _n_ctx(path)
    engine = OrtEngine(Path(path), n_ctx=n_ctx, n_batch=n_ctx, threads=first_guess()[0])
    return token_trial.complete(engine, prompt, n_tokens)


def race(paths: list[str], n_prompt: int, n_gen: int, rounds: int, budget_s: float) -> Any:
    """The race of ``race.run`` between ONNX language models."""
    n_prompt = min(n_prompt, min(map(_n_ctx, paths)) - n_gen)
    threads = first_guess()[0]
    # Threads of the one that waits would spin beside those of the other.
    benches = [
        OrtBencher(Path(path), n_ctx=n_prompt + n_gen, threads=threads, spin=False)
        for path in paths
    ]
    return run(benches, n_prompt, n_gen, rounds, budget_s) | {"threads": threads}


def _n_ctx(path: str) -> int:
    """Enough for a trial, and no more than the model was trained for."""
    return min(_N_CTX, language_model.beside(Path(path)).context_length)
