"""The llama.cpp runtime: sessions, benches and scorers for GGUF files.

Must never talk to the engine's C interface itself (``llama_engine``), nor parse a file's bytes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from edgekit.formats import gguf
from edgekit.runtime import LoadParams
from edgekit.runtimes import first_load, llama_scorer, threads
from edgekit.runtimes.llama_bencher import LlamaBencher
from edgekit.runtimes.llama_engine import Engine, check_params
from edgekit.runtimes.prompt_cache import PromptCache
from edgekit.runtimes.sampling import Sampler
from edgekit.runtimes.text_session import TextSession
from edgekit.runtimes.token_scorer import TokenScorer


class LlamaCppRuntime:
    """The engine for GGUF files."""

    def load(self, path: Path, params: LoadParams) -> LlamaSession:
        """Load a GGUF file, the first time in a child process (``first_load``) before this one.

        Raises SourceError, CorruptArtifactError or VersionError for a bad header,
        EngineCrashedError or DeadlineError for a file that kills or hangs the engine, LoadError for
        one that it refuses.
        """
        check_params(params)
        header = gguf.read(path)
        for adapter, _ in params.adapters:
            gguf.read(adapter)
        first_load.check(path, [adapter for adapter, _ in params.adapters])
        return LlamaSession(path, header, params)

    def bencher(
        self,
        path: Path,
        *,
        n_ctx: int,
        n_batch: int = 512,
        threads: int,
        kv_type: str = "f16",
        flash_attention: bool = True,
        n_seqs: int = 1,
    ) -> LlamaBencher:
        """A model for a stopwatch, as LlamaBencher says: only in a child process of edgekit."""
        return LlamaBencher(
            path,
            n_ctx=n_ctx,
            n_batch=n_batch,
            threads=threads,
            kv_type=kv_type,
            flash_attention=flash_attention,
            n_seqs=n_seqs,
        )

    def scorer(
        self, path: Path, *, n_ctx: int, threads: int | None, adapters: tuple[Path, ...] = ()
    ) -> TokenScorer:
        """A model that scores text (``edgekit.scorer``): only in a child of ``_proc.call``."""
        return llama_scorer.opened(path, n_ctx=n_ctx, threads=threads, adapters=adapters)


class LlamaSession(TextSession):
    """A loaded GGUF file, with threads that were measured, and the prompt cache of its user."""

    def __init__(self, path: Path, header: gguf.GgufHeader, params: LoadParams) -> None:
        known = threads.known(header, params)
        engine = Engine(path, header, params, threads=known or threads.first_guess())
        template = header.metadata.get("tokenizer.chat_template")
        try:
            if known is None:
                threads.measure(engine, header)
            wanted = params.prompt_cache
            super().__init__(
                engine,
                chat_template=str(template) if template else None,
                sampler=partial(Sampler, engine),
                embeddings=params.embeddings,
                cache=None if wanted is None else PromptCache(wanted, path, params),
            )
        except BaseException:  # nobody else can free a model that the caller never got
            engine.close()
            raise
