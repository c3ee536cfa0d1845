"""Chooses the next token from the engine's logits: greedy or sampled, free or inside a grammar.

Must never know the text: it sees logits and gives token ids.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit import llama_library
from edgekit.errors import UsageError
from edgekit.runtime import GenerateParams, TokenLogprob
from edgekit.runtimes import grammar_text
from edgekit.runtimes.array_sampling import report
from edgekit.runtimes.llama_engine import Engine
from edgekit.runtimes.token_engine import Logits

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Sampler:
    """One generation's way of choosing. Close it when done."""

    def __init__(self, engine: Engine, params: GenerateParams, prompt: Sequence[int]) -> None:
        """Raises UsageError for a grammar that does not parse."""
        self._engine = engine
        self._llama = llama_library.libllama()
        self._logprobs = params.logprobs
        self._grammar = self._chain = None
        self.logprobs: list[TokenLogprob] = []
        penalised = params.repeat_penalty != 1.0 and params.repeat_last_n > 0
        self.plain = params.temperature == 0 and not penalised
        if not self.plain:
            self._chain = self._make_chain(params, penalised)
            for token in prompt[-params.repeat_last_n :] if penalised else ():
                self._llama.llama_sampler_accept(self._chain, token)
        if (text := grammar_text.wanted(params)) is not None:
            self._grammar = self._make_grammar(text)
        self.free = self.plain and self._grammar is None and not self._logprobs

    def _make_chain(self, params: GenerateParams, penalised: bool) -> Any:
        llama = self._llama
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            llama.llama_sampler_chain_add(chain, sampler)

        if penalised:
            add(
                llama.llama_sampler_init_penalties(
                    self._engine.n_vocab, params.repeat_last_n, params.repeat_penalty, 0.0, 0.0
                )
            )
        if params.temperature == 0:
            add(llama.llama_sampler_init_greedy())
            return chain
        if params.top_k:
            add(llama.llama_sampler_init_top_k(params.top_k))
        if params.top_p < 1.0:
            add(llama.llama_sampler_init_top_p(params.top_p, 1))
        if params.min_p > 0.0:
            add(llama.llama_sampler_init_min_p(params.min_p, 1))
        add(llama.llama_sampler_init_temp(params.temperature))
        seed = secrets.randbits(32) if params.seed is None else params.seed
        add(llama.llama_sampler_init_dist(seed))
        return chain

    def _make_grammar(self, text: str) -> Any:
        """Raises UsageError with the engine's reason for a grammar that does not parse."""
        grammar = self._llama.llama_sampler_init_grammar(
            self._engine.vocabulary, text.encode("utf-8", "replace"), b"root"
        )
        if not grammar:
            raise UsageError("the grammar does not parse", hint=grammar_text.HINT)
        return grammar

    def next(self, logits: Logits) -> int | None:
        """The token that ``logits`` (shape [n_vocab]) lead to; None where the grammar ends."""
        if self._grammar is None:
            token = self._choose(logits) if self._chain else int(logits.argmax())
        else:
            chosen = self._choose_in_grammar(logits)
            if chosen is None:
                return None
            token = chosen
        if self._chain:
            self._llama.llama_sampler_accept(self._chain, token)
        if self._logprobs:
            text_of = self._engine.token_text
            self.logprobs.append(report(logits, token, self._logprobs, text_of))
        return token

    def _choose(self, logits: Logits) -> int:
        candidates = np.empty(self._engine.n_vocab, _CANDIDATE)
        candidates["id"] = np.arange(self._engine.n_vocab)
        candidates["logit"] = logits
        return self._select(candidates)

    def _select(self, candidates: Any) -> int:
        """Run the chain over an array of candidates, which it reorders."""
        array = self._array(candidates)
        self._llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _choose_in_grammar(self, logits: Logits) -> int | None:
        """First choose freely, which is cheap; what the grammar forbids is chosen again."""
        free = self._choose(logits) if self._chain else int(logits.argmax())
        if self._allows(free):
            token = free
        else:
            candidates = np.empty(self._engine.n_vocab, _CANDIDATE)
            candidates["id"] = np.arange(self._engine.n_vocab)
            candidates["logit"] = logits
            self._llama.llama_sampler_apply(self._grammar, ctypes.byref(self._array(candidates)))
            candidates = candidates[np.isfinite(candidates["logit"])]
            # The engine aborts the process when it must choose from nothing.
            if not len(candidates):
                return None
            if self._chain:
                token = self._select(candidates)
            else:
                token = int(candidates["id"][candidates["logit"].argmax()])
        self._llama.llama_sampler_accept(self._grammar, token)
        return token

    def _allows(self, token: int) -> bool:
        one = np.array([(token, 0.0, 0.0)], _CANDIDATE)
        self._llama.llama_sampler_apply(self._grammar, ctypes.byref(self._array(one)))
        return bool(np.isfinite(one["logit"][0]))

    def _array(self, candidates: Any) -> Any:
        llama = self._llama
        data = candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
        return llama.llama_token_data_array(data, len(candidates), -1, False)

    def close(self) -> None:
        for sampler in (self._chain, self._grammar):
            if sampler:
                self._llama.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def __del__(self) -> None:
        self.close()  # a stream that nobody began never gets to its own end
