"""One language model of ONNX Runtime: loads, decodes, and edits the KV cache, which lies in place.

Must never know prompts, sampling or chats: it counts in tokens and positions of one sequence. Past
and present of every layer are one buffer of ``n_ctx`` cells, bound once: a step copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from edgekit import language_model
from edgekit.errors import InferenceError, LoadError, UsageError
from edgekit.runtime import DEFAULT_N_CTX
from edgekit.runtimes import ort_start
from edgekit.runtimes.hf_tokens import HfTokens
from edgekit.runtimes.huge_pages import HugePages
from edgekit.runtimes.token_engine import Logits


class _Bound(NamedTuple):
    """A binding with the arrays that it reads and fills, and what must live as long."""

    binding: Any
    tokens: Any
    logits: Any
    hidden: Any
    kept: Any


class OrtEngine:
    """A loaded model with its cache (edgekit.runtimes.token_engine). Close it when done."""

    can_rewind = True
    can_shift = True

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int | None,
        n_batch: int,
        threads: int,
        hidden: bool = False,
        spin: bool = True,
        profile_to: Path | None = None,
    ) -> None:
        """Load ``path``. ``hidden``: ``embeddings`` works. ``spin``: waiting threads burn their
        cores, which is faster alone. ``profile_to``: where the engine's profiler writes what each
        operator takes (``end_profile``).

        Raises LoadError with the engine's reason, UsageError for an n_ctx above the trained one,
        CorruptArtifactError for files beside the model that are broken.
        """
        facts = self._facts = language_model.beside(path)
        if n_ctx is not None and n_ctx > facts.context_length:
            raise UsageError(
                f"n_ctx {n_ctx} is more than the {facts.context_length} this model was trained for"
            )
        self.n_ctx = n_ctx or min(facts.context_length, DEFAULT_N_CTX)
        self.n_batch = min(n_batch, self.n_ctx)
        self.threads = threads
        self.n_vocab, self.n_layers = facts.vocab_size, facts.layers
        self.bos = -1 if facts.bos is None else facts.bos
        self.eos = -1 if facts.eos is None else facts.eos
        self.adds_bos = facts.adds_bos
        self._ends = frozenset(facts.ends)
        tokens = HfTokens(path.parent, facts)
        self.tokenize, self.tokenize_on = tokens.tokenize, tokens.tokenize_on
        self.piece, self.token_text = tokens.piece, tokens.token_text
        self.control_texts = tokens.control_texts
        self._session: Any = started(path, threads, spin=spin, profile_to=profile_to)
        try:
            self._make_cache()
            self._with_hidden = hidden
            self._newest = self._single = self._bound(1, 1)
        except Exception as error:
            raise LoadError(f"ONNX Runtime refuses {path}: {ort_start.reason(error)}") from None

    # Buffers

    def _make_cache(self) -> None:
        """[1, kv heads, n_ctx, head] for keys and values of every layer. The kernel hands out
        memory for it as cells are written.
        """
        facts = self._facts
        shape = (1, facts.kv_heads, self.n_ctx, facts.head_dim)
        self._cells = {
            f"{layer}.{kind}": np.zeros(shape, np.float32)
            for layer in range(facts.layers)
            for kind in ("key", "value")
        }
        self._ort_cells = {name: _value(cells) for name, cells in self._cells.items()}
        self._length = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)

    def _bound(self, count: int, outputs: int) -> _Bound:
        """Inputs and outputs for ``count`` tokens, of which the last ``outputs`` get logits."""
        tokens = np.zeros((1, count), np.int64)
        rows = np.arange(count - outputs, count)
        logits = np.zeros((1, outputs, self.n_vocab), np.float32)
        results = {"logits": logits}
        if self._with_hidden:
            results["hidden"] = np.zeros((1, outputs, self._facts.width), np.float32)
        inputs = {
            "input_ids": tokens,
            "rows": rows,
            "seqlens_k": self._length,
            "total_sequence_length": self._total,
        }
        binding = self._session.io_binding()
        values = {name: _value(array) for name, array in (inputs | results).items()}
        for name in inputs:
            binding.bind_ortvalue_input(name, values[name])
        for name in results:
            binding.bind_ortvalue_output(name, values[name])
        for name, value in self._ort_cells.items():
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        # A binding does not keep what it is bound to.
        return _Bound(binding, tokens, logits, results.get("hidden"), (inputs, values))

    # Decoding

    def decode(self, tokens: Sequence[int], position: int, *, outputs: int = 1) -> None:
        """Feed at most ``n_batch`` tokens that stand at ``position`` and after it.

        The last ``outputs`` of them get logits. Raises InferenceError when the engine fails.
        """
        count = len(tokens)
        bound = self._single if count == outputs == 1 else self._bound(count, outputs)
        bound.tokens[0, :] = tokens
        self._run(bound, position + count)

    def decode_one(self, token: int, position: int) -> None:
        """``decode`` for one token, on the shortest way."""
        self._single.tokens[0, 0] = token
        self._run(self._single, position + 1)

    def _run(self, bound: _Bound, total: int) -> None:
        self._length[0] = total - 1
        self._total[...] = total
        self._newest = bound
        try:
            self._session.run_with_iobinding(bound.binding)
        except Exception as error:  # the engine's own kinds, which have no common base
            raise InferenceError(f"ONNX Runtime failed: {ort_start.reason(error)}") from None

    def logits(self, row: int = -1) -> Logits:
        """Logits of one output of the last decode, shape [n_vocab]; a view, until the next one."""
        found: Logits = self._newest.logits[0, row]
        return found

    def logits_block(self, count: int) -> Logits:
        """Logits of the last ``count`` outputs of the last decode, [count, n_vocab]; a view, until
        the next decode of as many tokens.
        """
        found: Logits = self._newest.logits[0, -count:]
        return found

    def embeddings(self, rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Hidden states of the last ``rows`` outputs, shape [rows, width]; a copy."""
        if self._newest.hidden is None:
            raise UsageError("this session gives no embeddings", hint="load with embeddings=True")
        found: Logits = self._newest.hidden[0, -rows:].copy()
        return found

    def ends(self, token: int) -> bool:
        """Whether ``token`` ends a turn or a text."""
        return token in self._ends

    # KV cache

    def forget(self, position: int, end: int = -1) -> bool:
        """Drop the cells from ``position`` up to ``end``: nothing to do, for the next text is
        written over them, and what lies behind its end is never read.
        """
        return True

    def shift(self, position: int, delta: int) -> None:
        """Move the cells from ``position`` on by ``delta`` positions (to the front), and turn the
        keys back by as much: rotary positions add up.
        """
        start, target = position, position + delta
        for each in self._facts.turning:
            angles = np.array(each.frequencies, np.float64) * delta
            cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            for layer in each.layers:
                for kind in ("key", "value"):
                    cells = self._cells[f"{layer}.{kind}"][0]
                    moved = cells[:, start:].copy()
                    if kind == "key":
                        first, second = np.split(moved, 2, axis=-1)
                        moved = np.concatenate(
                            [first * cos - second * sin, second * cos + first * sin], axis=-1
                        )
                    cells[:, target : target + moved.shape[1]] = moved

    def save_state(self) -> bytes:
        """Not offered: see ``ort_lm``."""
        raise UsageError("ONNX language models keep no prompt cache")

    def load_state(self, state: bytes) -> bool:
        """Not offered."""
        return False

    def end_profile(self) -> Path:
        """The profiler's file, complete."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free everything; closing twice is fine."""
        self._session = None
        self.__dict__.pop("_single", None)
        self.__dict__.pop("_newest", None)
        self._cells, self._ort_cells = {}, {}


def started(path: Path, threads: int, *, spin: bool = True, profile_to: Path | None = None) -> Any:
    """An engine's session, its weights in large pages. Raises LoadError."""
    options = ort_start.options_for(threads)
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    pages = HugePages()
    session = ort_start.opened(path, options)
    pages.collapse()
    return session


def _value(array: Any) -> Any:
    """An OrtValue over the array's own memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
