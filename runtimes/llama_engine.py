"""One model and one context of llama.cpp: load, tokenise, decode, and edit the KV cache.

Must never know prompts, sampling or chats: it counts in tokens and positions of one sequence.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import llama_library
from edgekit.errors import InferenceError, LoadError, UsageError
from edgekit.formats.ggml_types import TYPES
from edgekit.formats.gguf import GgufHeader
from edgekit.runtime import DEFAULT_N_CTX, KV_TYPES, LoadParams
from edgekit.runtimes.gpu_layers import layers_that_fit
from edgekit.runtimes.huge_pages import HugePages
from edgekit.runtimes.signal_flag import SignalFlag
from edgekit.runtimes.token_engine import Logits

_TYPE_NUMBERS = {kind.name.lower(): number for number, kind in TYPES.items()}
_FLOATS = ("f32", "f16", "bf16")
_FLASH_OFF, _FLASH_AUTO = 0, -1
_POOLING_NONE = 0
_CONTROL = 1 | 8  # LLAMA_TOKEN_ATTR_UNKNOWN and _CONTROL: what "special" switches on
_SHORT = 32  # tokens that are evaluated before anybody loses patience
_SENTENCEPIECE = 1  # LLAMA_VOCAB_TYPE_SPM
_MOST_VIEWS = 64
_ABORTED = 2  # llama_decode's answer when its callback said so


class Engine:
    """A loaded model with its context: sequence 0, positions from 0 on. Close it when done."""

    def __init__(
        self, path: Path, header: GgufHeader, params: LoadParams, *, threads: tuple[int, int]
    ) -> None:
        """Load ``path``; ``threads`` are those for decode and for prefill.

        Raises LoadError with the engine's own last reason.
        """
        self._llama = llama = llama_library.libllama()
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._pools: dict[tuple[int, int], llama_library.Threadpools] = {}
        self._adapters: list[Any] = []
        self._signals = SignalFlag()
        self._address_of_logits = _returning_address(llama, "llama_get_logits_ith")
        self._views: dict[tuple[int, int], Logits] = {}
        self._closed = False
        try:
            self._load_model(path, header, params)
            self._read_vocabulary(llama.llama_model_get_vocab(self._model))
            self.n_ctx = self._choose_n_ctx(params.n_ctx)
            self.n_batch = min(params.n_batch, self.n_ctx)
            self._make_context(params, threads)
            self._memory = llama.llama_get_memory(self._context)
            self._attach_adapters(params.adapters)
            self.set_threads(*threads)
            self._make_batch()
        except BaseException:
            self.close()
            raise

    def _read_vocabulary(self, vocabulary: Any) -> None:
        llama = self._llama
        self.vocabulary = vocabulary
        self.n_vocab: int = llama.llama_vocab_n_tokens(vocabulary)
        self.adds_bos: bool = llama.llama_vocab_get_add_bos(vocabulary)
        self.bos: int = llama.llama_vocab_bos(vocabulary)
        self.eos: int = llama.llama_vocab_eos(vocabulary)
        self._text = ctypes.create_string_buffer(64)
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}

    # Loading

    def _load_model(self, path: Path, header: GgufHeader, params: LoadParams) -> None:
        llama = self._llama
        wanted = llama.llama_model_default_params()
        layers = params.n_gpu_layers
        wanted.n_gpu_layers = layers_that_fit(header, params) if layers is None else layers
        pages = HugePages()
        with self._signals.watching() as noted:

            def go_on(_done: float, _: Any) -> bool:
                pages.advise()  # the first call comes when the weights have their memory, empty
                return not noted

            wanted.progress_callback = llama.llama_progress_callback(go_on)
            self._model = llama.llama_model_load_from_file(os.fsencode(path), wanted)
        self._or_reason(self._model, f"cannot load {path}")

    def _choose_n_ctx(self, asked: int | None) -> int:
        trained = self._llama.llama_model_n_ctx_train(self._model)
        if asked is not None and asked > trained:
            raise UsageError(f"n_ctx {asked} is more than the {trained} this model was trained for")
        return int(asked or min(trained, DEFAULT_N_CTX))

    def _context_params(self, params: LoadParams, threads: tuple[int, int]) -> Any:
        wanted = self._llama.llama_context_default_params()
        wanted.n_ctx = self.n_ctx
        wanted.n_batch = wanted.n_ubatch = self.n_batch
        wanted.n_threads, wanted.n_threads_batch = threads
        wanted.type_k = wanted.type_v = _TYPE_NUMBERS[params.kv_type]
        wanted.flash_attn_type = _FLASH_AUTO if params.flash_attention else _FLASH_OFF
        wanted.embeddings = params.embeddings
        if params.embeddings:
            wanted.pooling_type = (
                _POOLING_NONE  # the session pools; a pooled context gives no logits
            )
        wanted.no_perf = True
        return wanted

    def _make_context(self, params: LoadParams, threads: tuple[int, int]) -> None:
        wanted = self._context_params(params, threads)
        with self._signals.watching():
            self._context = self._llama.llama_init_from_model(self._model, wanted)
        self._or_reason(self._context, f"cannot make a context of {self.n_ctx} tokens")

    def _attach_adapters(self, adapters: tuple[tuple[Path, float], ...]) -> None:
        llama = self._llama
        for path, _ in adapters:
            adapter = llama.llama_adapter_lora_init(self._model, os.fsencode(path))
            self._adapters.append(self._or_reason(adapter, f"cannot load the adapter {path}"))
        if adapters:
            count = len(adapters)
            llama.llama_set_adapters_lora(
                self._context,
                (llama.llama_adapter_lora_p_ctypes * count)(*self._adapters),
                count,
                (ctypes.c_float * count)(*(scale for _, scale in adapters)),
            )

    def _or_reason(self, handle: Any, what: str) -> Any:
        """``handle``, or LoadError with the engine's last words about an error."""
        if handle:
            return handle
        # Its very last line only says that it failed.
        lines = llama_library.recent_log()
        reason = next((line for line in reversed(lines) if "error" in line), "")
        raise LoadError(f"{what}: {reason}" if reason else what)

    def _make_batch(self) -> None:
        """The one batch that every decode reuses, and numpy views of its columns."""
        size = self.n_batch
        self._batch = batch = self._llama.llama_batch_init(size, 0, 1)
        self._tokens = np.ctypeslib.as_array(batch.token, (size,))
        self._positions = np.ctypeslib.as_array(batch.pos, (size,))
        self._wanted = np.ctypeslib.as_array(batch.logits, (size,))
        for i in range(size):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
        self._wanted[:] = 0

    def set_threads(self, decode: int, prefill: int) -> None:
        """Use so many threads, which stay alive between calls."""
        # The engine touches the pools of the last call again, so they live as long as the context.
        key = decode, prefill
        if key not in self._pools:
            self._pools[key] = llama_library.Threadpools(*key)
        self._pools[key].attach(self._context)
        self._llama.llama_set_n_threads(self._context, decode, prefill)

    def close(self) -> None:
        """Free everything; closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._signals.close()
        llama = self._llama
        if self._batch:
            llama.llama_batch_free(self._batch)
        if self._context:
            llama.llama_free(self._context)
        for pools in self._pools.values():
            pools.close()
        for adapter in self._adapters:
            llama.llama_adapter_lora_free(adapter)
        if self._model:
            llama.llama_model_free(self._model)

    # Text and tokens

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of ``text``; control tokens are recognised only with ``special``. Adds none."""
        raw = text.encode("utf-8", "replace")
        count = len(raw) + 2
        buffer = (ctypes.c_int32 * count)()
        found = self._llama.llama_tokenize(
            self.vocabulary, raw, len(raw), buffer, count, False, special
        )
        if found < 0:
            raise InferenceError("the engine could not tokenise the text")
        return buffer[:found]

    def tokenize_on(self, text: str) -> list[int]:
        """``tokenize`` with control tokens, for text that goes on after other text.

        SentencePiece puts a space before every text; behind a line break it can be cut off.
        """
        if self._llama.llama_vocab_type(self.vocabulary) == _SENTENCEPIECE:
            start = self.tokenize("\n", special=True)
            tokens = self.tokenize("\n" + text, special=True)
            if tokens[: len(start)] == start:
                return tokens[len(start) :]
        return self.tokenize(text, special=True)

    def piece(self, token: int) -> bytes:
        """The bytes of ``token``, perhaps a part of a character; none for a control token."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._render(token, special=False)
        return known

    def _render(self, token: int, *, special: bool) -> bytes:
        while True:
            buffer = self._text
            length = self._llama.llama_token_to_piece(
                self.vocabulary, token, buffer, len(buffer), 0, special
            )
            if length >= 0:
                return buffer.raw[:length]
            self._text = ctypes.create_string_buffer(-length)

    def ends(self, token: int) -> bool:
        """Whether ``token`` ends a turn or a text."""
        known = self._ends.get(token)
        if known is None:
            known = self._ends[token] = bool(self._llama.llama_vocab_is_eog(self.vocabulary, token))
        return known

    def control_texts(self) -> list[str]:
        """What every control token looks like when it is written out. Takes 40 ms."""
        attributes = self._llama.llama_vocab_get_attr
        texts = [
            self.token_text(token)
            for token in range(self.n_vocab)
            if attributes(self.vocabulary, token) & _CONTROL
        ]
        return [text for text in texts if text]

    def token_text(self, token: int) -> str:
        """A token as it is written in a template; "" for none (-1)."""
        return "" if token < 0 else self._render(token, special=True).decode("utf-8", "replace")

    # Decoding

    def decode(self, tokens: Sequence[int], position: int, *, outputs: int = 1) -> None:
        """Feed at most ``n_batch`` tokens that stand at ``position`` and after it.

        The last ``outputs`` of them get logits. Ctrl-C and TERM end a long batch early.
        Raises InferenceError when the engine fails.
        """
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = np.arange(position, position + count)
        self._wanted[count - outputs : count] = 1
        self._batch.n_tokens = count
        try:
            code = self._evaluate() if count <= _SHORT else self._evaluate_long(position)
        finally:
            self._wanted[count - outputs : count] = 0
        if code:
            raise InferenceError(f"the engine failed to evaluate {count} tokens (code {code})")

    def decode_one(self, token: int, position: int) -> None:
        """``decode`` for one token, on the shortest way."""
        self._tokens[0] = token
        self._positions[0] = position
        self._wanted[0] = 1
        self._batch.n_tokens = 1
        code = self._llama.llama_decode(self._context, self._batch)
        self._wanted[0] = 0
        if code:
            raise InferenceError(f"the engine failed to evaluate a token (code {code})")

    def _evaluate(self) -> int:
        return int(self._llama.llama_decode(self._context, self._batch))

    def _evaluate_long(self, position: int) -> int:
        """``_evaluate``, which a signal stops in the middle; its handler then runs in here."""
        llama = self._llama
        ask = ctypes.cast(self._signals.ask, llama.ggml_abort_callback)
        while True:
            llama.llama_set_abort_callback(self._context, ask, self._signals.memory)
            try:
                with self._signals.watching() as noted:
                    code = self._evaluate()
            finally:
                llama.llama_set_abort_callback(self._context, llama.ggml_abort_callback(), None)
            # A handler that lets us go on: once more, from the start.
            if not (noted and code == _ABORTED and self.forget(position)):
                return code

    def logits(self, row: int = -1) -> Logits:
        """Logits of one output of the last decode, shape [n_vocab]; a view, until the next one."""
        row_of_one: Logits = self._view(row, 1)[0]
        return row_of_one

    def logits_block(self, count: int) -> Logits:
        """Logits of the last ``count`` outputs of the last decode, [count, n_vocab]; a view, until
        the next decode.
        """
        return self._view(-count, count)

    def _view(self, row: int, count: int) -> Logits:
        """The engine's own memory, which mostly lies where it lay at the last token.

        To make an array of a pointer takes 60 us, as long as a hundredth of a small model's token.
        """
        address = self._address_of_logits(self._context, row)
        if address is None:
            raise InferenceError(f"the engine has no logits of output {row}")
        known = self._views.get((address, count))
        if known is None:
            block = (ctypes.c_float * self.n_vocab * count).from_address(address)
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            known = self._views[address, count] = np.ctypeslib.as_array(block)
        return known

    def embeddings(self, rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Hidden states of the last ``rows`` outputs, shape [rows, n_embd]; a copy."""
        width = self._llama.llama_model_n_embd_out(self._model)
        return np.stack(
            [
                np.ctypeslib.as_array(
                    self._llama.llama_get_embeddings_ith(self._context, i), (width,)
                )
                for i in range(rows)
            ]
        )

    # KV cache

    def forget(self, position: int, end: int = -1) -> bool:
        """Drop the cells from ``position`` up to ``end``; False where only all can go."""
        if position == 0 and end < 0:
            self._llama.llama_memory_clear(self._memory, False)
            return True
        return bool(self._llama.llama_memory_seq_rm(self._memory, 0, position, end))

    def shift(self, position: int, delta: int) -> None:
        """Move the cells from ``position`` on by ``delta`` positions."""
        self._llama.llama_memory_seq_add(self._memory, 0, position, -1, delta)

    @property
    def can_rewind(self) -> bool:
        """Whether the last tokens alone can be forgotten; a recurrent state cannot be cut."""
        recurrent = self._llama.llama_model_is_recurrent(self._model)
        return not (recurrent or self._llama.llama_model_is_hybrid(self._model))

    @property
    def can_shift(self) -> bool:
        return bool(self._llama.llama_memory_can_shift(self._memory))

    def save_state(self) -> bytes:
        """The KV cells of the sequence, in llama.cpp's own form."""
        size = self._llama.llama_state_seq_get_size(self._context, 0)
        buffer = (ctypes.c_uint8 * size)()
        written = self._llama.llama_state_seq_get_data(self._context, buffer, size, 0)
        return bytes(memoryview(buffer)[:written])

    def load_state(self, state: bytes) -> bool:
        """Take over what ``save_state`` gave; False, with an empty cache, if it does not fit."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        read = self._llama.llama_state_seq_set_data(self._context, buffer, len(state), 0)
        if read != len(state):
            self.forget(0)
        return bool(read == len(state))


def _returning_address(llama: Any, name: str) -> Callable[[Any, int], int | None]:
    """A function of (context, number) that returns a pointer, without the 25 us of wrapping it."""
    prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
    return prototype((name, llama._lib))


def check_params(params: LoadParams) -> None:
    """UsageError for a LoadParams that no model could be loaded with."""
    bounds = {
        "n_ctx": (1, 1 << 24),
        "n_batch": (1, 1 << 14),
        "n_threads": (1, 512),
        "n_gpu_layers": (0, 1 << 16),
    }
    for name, (low, high) in bounds.items():
        value = getattr(params, name)
        if value is not None and not (type(value) is int and low <= value <= high):
            raise UsageError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    if params.kv_type not in KV_TYPES:
        raise UsageError(
            f"kv_type '{params.kv_type}' is unknown", hint=f"known: {', '.join(KV_TYPES)}"
        )
    if params.kv_type not in _FLOATS and not params.flash_attention:
        raise UsageError(f"kv_type {params.kv_type} needs flash attention")
    for path, scale in params.adapters:
        if not math.isfinite(scale):
            raise UsageError(f"the scale of the adapter {path} must be a finite number")
