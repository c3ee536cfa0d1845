"""Asks llama.cpp itself what a GGUF file means: token ids of a text, logits of token ids."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.llama_library import libllama, recent_log


class Engine:
    """One model, loaded without its weights where only the vocabulary is asked."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocab = libllama().llama_model_get_vocab(model)

    def ids(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """The tokens of ``text``."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        count = libllama().llama_tokenize(
            self._vocab, raw, len(raw), room, len(room), add_special, parse_special
        )
        assert count >= 0
        return list(room[:count])

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Logits after each of ``ids``, float32 [len(ids), vocabulary], with an F32 KV cache."""
        lib = libllama()
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 256 if len(ids) <= 256 else 512
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = 0
        params.flash_attn_type = 0
        context = lib.llama_init_from_model(self._model, params)
        assert context, recent_log()
        batch = lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, at
                batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, 0, 1
            assert lib.llama_decode(context, batch) == 0
            size = lib.llama_vocab_n_tokens(self._vocab)
            rows = (lib.llama_get_logits_ith(context, at) for at in range(len(ids)))
            return np.array([np.ctypeslib.as_array(row, (size,)) for row in rows])
        finally:
            lib.llama_batch_free(batch)
            lib.llama_free(context)


@contextmanager
def opened(path: Path, *, vocab_only: bool = False) -> Iterator[Engine]:
    """The file in llama.cpp, on the CPU."""
    lib = libllama()
    params = lib.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = vocab_only, 0
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model, recent_log()
    try:
        yield Engine(model)
    finally:
        lib.llama_model_free(model)
