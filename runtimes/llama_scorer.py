"""llama.cpp as a scorer of texts (``token_scorer``): how the engine is loaded for it.

Must never be used outside a child process: it does no first-load check.
"""

from __future__ import annotations

from pathlib import Path

from edgekit.formats import gguf
from edgekit.runtime import LoadParams
from edgekit.runtimes import threads as thread_counts
from edgekit.runtimes.llama_engine import Engine, check_params
from edgekit.runtimes.token_scorer import TokenScorer
from edgekit.scorer import BLOCK_TOKENS


class _Engine(Engine):
    """An engine whose threads live no longer than a decode.

    Those that stay wait in a spin for the next one: beside a second model, which is decoded in
    turn with the first, they would keep the cores from it.
    """

    def set_threads(self, decode: int, prefill: int) -> None:
        self._llama.llama_set_n_threads(self._context, decode, prefill)


def opened(
    path: Path,
    *,
    n_ctx: int = 512,
    threads: int | None = None,
    adapters: tuple[Path, ...] = (),
) -> TokenScorer:
    """A GGUF file, loaded. Raises UsageError, LoadError, and what reading a header raises."""
    params = LoadParams(
        n_ctx=n_ctx,
        n_batch=BLOCK_TOKENS,
        n_threads=threads,
        n_gpu_layers=0,  # drivers reserve more address space than the child may have
        adapters=tuple((file, 1.0) for file in adapters),
    )
    check_params(params)
    header = gguf.read(path)
    for file in adapters:
        gguf.read(file)
    counts = thread_counts.known(header, params) or thread_counts.first_guess()
    return TokenScorer(_Engine(path, header, params, threads=counts))
