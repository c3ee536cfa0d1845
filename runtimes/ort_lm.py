"""ONNX Runtime for language models: a session for an artifact, and the first load that precedes it.

Must never parse a model before edgekit's own reader has, nor print what the engine says of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from pathlib import Path

from edgekit.errors import UsageError
from edgekit.formats import onnx
from edgekit.language_model import FILE as FACTS
from edgekit.language_model import TEMPLATE, TOKENIZER, chat_template
from edgekit.runtime import GenerateParams, LoadParams
from edgekit.runtimes import first_load, grammar_text
from edgekit.runtimes import threads as thread_counts
from edgekit.runtimes.array_sampling import ArraySampler
from edgekit.runtimes.ort_engine import OrtEngine
from edgekit.runtimes.text_session import TextSession
from edgekit.runtimes.token_grammar import TokenGrammars
from edgekit.runtimes.token_scorer import TokenScorer
from edgekit.scorer import BLOCK_TOKENS

_TAKEN = ("n_ctx", "n_batch", "n_threads", "embeddings", "n_gpu_layers", "kv_type")
_BOUNDS = {"n_ctx": (1, 1 << 24), "n_batch": (1, 1 << 14), "n_threads": (1, 512)}


def load(path: Path, params: LoadParams) -> TextSession:
    """A session for the language model at ``path``, the first time in a child process before this
    one. Raises what ``ort.OrtRuntime.load`` says.
    """
    check_params(params)
    pass_first(path)
    count = params.n_threads or thread_counts.first_guess()[0]
    engine = OrtEngine(
        path,
        n_ctx=params.n_ctx,
        n_batch=params.n_batch,
        threads=count,
        hidden=params.embeddings,
    )
    try:
        return TextSession(
            engine,
            chat_template=chat_template(path),
            sampler=partial(_sampler, engine, TokenGrammars(engine)),
            embeddings=params.embeddings,
        )
    except BaseException:  # nobody else can free a model that the caller never got
        engine.close()
        raise


def scorer(path: Path, *, n_ctx: int = 512, threads: int | None = None) -> TokenScorer:
    """The language model at ``path``, to score texts: only in a child process, for it does no
    first-load check. Raises UsageError, LoadError, and what reading a header raises.
    """
    onnx.read(path)
    # Threads that wait in a spin would keep the cores from a second model beside this one.
    engine = OrtEngine(
        path,
        n_ctx=n_ctx,
        n_batch=BLOCK_TOKENS,
        threads=threads or thread_counts.first_guess()[0],
        spin=False,
    )
    return TokenScorer(engine)


def _sampler(
    engine: OrtEngine, grammars: TokenGrammars, params: GenerateParams, prompt: Sequence[int]
) -> ArraySampler:
    text = grammar_text.wanted(params)
    grammar = None if text is None else grammars.parsed(text)
    return ArraySampler(params, prompt, engine.token_text, grammar)


def pass_first(path: Path) -> None:
    """The first load in a child. Raises EngineCrashedError, DeadlineError, LoadError, and what
    reading a header raises.
    """
    header = onnx.read(path)
    texts = [name for name in (FACTS, TOKENIZER, TEMPLATE) if (path.parent / name).is_file()]
    first_load.pass_once(
        [path, *(path.parent / name for name in [*header.beside, *texts])],
        "edgekit.runtimes.ort_lm:attempt",
        {"path": str(path.absolute())},
        version("onnxruntime"),
    )


def attempt(path: str) -> None:
    """In the child: load, tokenise, decode two tokens at once and one, and render every token."""
    engine = OrtEngine(Path(path), n_ctx=8, n_batch=8, threads=1)
    tokens = engine.tokenize("Hello, 世界 <|im_end|>", special=True) or [0]
    engine.decode([0, *tokens[:1]], 0)
    engine.decode_one(0, 2)
    engine.logits()
    for token in range(engine.n_vocab):
        engine.piece(token)


def check_params(params: LoadParams) -> None:
    """UsageError for what this engine cannot do, or nobody could."""
    for field in fields(LoadParams):
        if field.name in _TAKEN or getattr(params, field.name) == field.default:
            continue
        raise UsageError(f"{field.name} is for GGUF models; an ONNX model does not take it")
    if params.kv_type not in ("f16", "f32"):
        raise UsageError("an ONNX language model keeps its KV cache in f32, and no other type")
    if params.n_gpu_layers:
        raise UsageError("an ONNX language model runs on the CPU here")
    for name, (low, high) in _BOUNDS.items():
        value = getattr(params, name)
        if value is not None and not (type(value) is int and low <= value <= high):
            raise UsageError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
