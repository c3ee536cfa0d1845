"""What a runtime must offer, the bounds on what a user may ask of it, and ``load``.

Knows no engine: those are on the shelf ``runtimes/`` and come through the registry.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from edgekit import _fs
from edgekit.artifact import Artifact
from edgekit.errors import LoadError, UsageError
from edgekit.receipt import Receipt
from edgekit.registry import OTHER_RUNTIMES, RUNTIME_OF_FORMAT, RUNTIMES, did_you_mean

# Where neither the user nor the model says less: a KV cache takes memory for every token.
DEFAULT_N_CTX = 4096
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
POOLINGS = ("mean", "last", "cls")

_BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1_000_000),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1_000_000),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.01, 10.0),
    "repeat_last_n": (0, 65_536),
    "logprobs": (0, 100),
    "n_keep": (0, 65_536),
}


# llama.cpp takes 2**32 - 1 for "draw one".
_MAX_SEED = (1 << 32) - 2


@dataclass(frozen=True)
class GenerateParams:
    """How to generate. The defaults are greedy (temperature 0): the same answer every time.

    ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repeat_penalty`` 1 each mean "off". ``logprobs`` is
    the number of alternatives to report per token (0: none). ``repeat_penalty`` makes the last
    ``repeat_last_n`` tokens of prompt and answer less likely. ``seed`` None draws a fresh one.
    At most one of ``json_schema`` (a JSON schema as a dict) and ``grammar`` (GBNF text) may be
    given. A grammar is a program, and the engine may run for ever over a hostile one: take schemas
    from strangers, but grammars only from yourself.
    ``speculate`` drafts tokens by looking up repeated text; it serves greedy answers, never changes
    them, and is idle where it does not pay. ``endless`` goes on when the context is full: the first
    ``n_keep`` tokens stay (attention sinks, https://arxiv.org/abs/2309.17453; in a chat the system
    message stays too), the older half of the rest is dropped.
    Raises UsageError for a value out of bounds.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    speculate: bool = False
    endless: bool = False
    n_keep: int = 4

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{name} must be a number, not {value!r}")
            if isinstance(getattr(GenerateParams, name), int) and not isinstance(value, int):
                raise UsageError(f"{name} must be a whole number, not {value!r}")
            if not math.isfinite(value) or not low <= value <= high:
                raise UsageError(f"{name} must lie between {low:g} and {high:g}, not {value!r}")
        if isinstance(self.stop, str):
            raise UsageError("stop must be a tuple of strings")
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed <= _MAX_SEED):
            raise UsageError(f"seed must be a whole number from 0 to {_MAX_SEED}")
        if len(self.stop) > 16 or any(not s or len(s) > 1024 for s in self.stop):
            raise UsageError("stop takes at most 16 strings of 1 to 1024 characters")
        if self.json_schema is not None and self.grammar is not None:
            raise UsageError("give json_schema or grammar, not both")


def merged(params: GenerateParams | None, fields: dict[str, Any]) -> GenerateParams:
    """``params`` (or the defaults) with single fields replaced. UsageError for an unknown field."""
    for name in fields:
        if name not in GenerateParams.__dataclass_fields__:
            raise UsageError(
                f"there is no generation parameter '{name}'",
                hint=did_you_mean(name, list(GenerateParams.__dataclass_fields__)),
            )
    if "stop" in fields and isinstance(fields["stop"], list):
        fields = fields | {"stop": tuple(fields["stop"])}
    return replace(params or GenerateParams(), **fields)


@dataclass(frozen=True)
class LoadParams:
    """How to load a language model.

    ``n_ctx`` None: the model's own context, at most 4096 tokens. ``n_batch``: tokens of a prompt
    that the engine reads at once; more is faster, and takes more memory. ``n_threads`` None: the
    count that was measured fastest on this machine. ``n_gpu_layers`` None: as many layers as fit.
    ``kv_type`` is the type of the KV cache, one of ``KV_TYPES``. ``flash_attention`` False keeps
    the engine from its fused attention, which is faster wherever it works and which quantized
    cache types need. ``adapters`` are LoRA files with their scales. ``prompt_cache`` is a file that
    keeps the last prompt's KV state between runs; one that cannot be written is a warning in the
    log, no error.
    ``embeddings`` makes ``embed`` possible, and everything else a little slower.
    """

    n_ctx: int | None = None
    n_batch: int = 512
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    kv_type: str = "f16"
    flash_attention: bool = True
    adapters: tuple[tuple[Path, float], ...] = ()
    prompt_cache: Path | None = None
    embeddings: bool = False

    def __post_init__(self) -> None:
        # A path may come as text, and an adapter without a scale.
        if isinstance(self.prompt_cache, str):
            object.__setattr__(self, "prompt_cache", Path(self.prompt_cache))
        pairs = [(x, 1.0) if isinstance(x, str | Path) else x for x in self.adapters]
        object.__setattr__(self, "adapters", tuple((Path(file), scale) for file, scale in pairs))


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, its natural-log probability, and the best alternatives with theirs."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass
class Generation:
    """What a finished generation was: text, token ids, why it ended, and how long it took.

    ``finish_reason`` is "stop" (end token or stop string), "length" (max_tokens or full context).
    ``prompt_ms`` and ``decode_ms`` are engine times; ``decode_tokens`` counts what was generated.
    ``cached_tokens`` of the prompt needed no work, for the KV cache held them. Speculation proposed
    ``drafted_tokens``; ``accepted_tokens`` of them became part of the answer.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_ms: float = 0.0
    decode_ms: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def decode_tokens(self) -> int:
        return len(self.tokens)

    @property
    def prefill_tok_s(self) -> float:
        fresh = self.prompt_tokens - self.cached_tokens
        return fresh / self.prompt_ms * 1e3 if self.prompt_ms else 0.0

    @property
    def decode_tok_s(self) -> float:
        # The first token comes out of the prefill.
        steps = max(0, self.decode_tokens - 1)
        return steps / self.decode_ms * 1e3 if self.decode_ms else 0.0


class Session(Protocol):
    """A loaded model. Not thread-safe: one caller at a time. Close it, or use it in ``with``."""

    def stream(
        self, prompt: str, params: GenerateParams | None = None, **fields: Any
    ) -> Iterator[str]:
        """Pieces of text as they are generated; ``fields`` override single fields of ``params``.

        When the iterator is exhausted (or closed), ``last`` holds the Generation.
        """
        ...

    def complete(
        self, prompt: str, params: GenerateParams | None = None, **fields: Any
    ) -> Generation:
        """``stream`` to its end."""
        ...

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        params: GenerateParams | None = None,
        **fields: Any,
    ) -> Iterator[str]:
        """Stream the assistant's next turn; the prompt comes from the model's own chat template."""
        ...

    def embed(self, text: str, *, pooling: str = "mean") -> list[float]:
        """A vector of length 1 for ``text``; ``pooling`` is "mean", "last" or "cls"."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text: no BOS, and control tokens are plain text too."""
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no valid UTF-8 becomes U+FFFD."""
        ...

    def reset(self) -> None:
        """Forget all earlier prompts, so that the next one is evaluated from its first token."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` works: the model brings a chat template."""
        ...

    @property
    def last(self) -> Generation:
        """The newest generation; its figures are whole once its iterator has ended."""
        ...

    def close(self) -> None:
        """Write the prompt cache, if one was asked for, and free the model. Twice is fine."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph: ``dtype`` in numpy's words; a dimension is a size, the name of
    a free one, or None.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class TensorSession(Protocol):
    """A loaded model of tensors: vision models, encoders, any graph. Close it, or use it in
    ``with``. One caller at a time.
    """

    @property
    def task(self) -> str:
        """What the model is for: one of ``preprocess.Task``."""
        ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` takes."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What ``run`` gives."""
        ...

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays by name in, numpy arrays by name out. UsageError for wrong names or shapes."""
        ...

    def classify(self, what: Any, *, top: int = 5) -> list[tuple[str, float]]:
        """The likeliest classes of an image or a text, with their probabilities, best first. A
        model of images and texts takes them as ``labels``, and also has ``embed_image``.
        """
        ...

    def embed(self, what: Any) -> list[float] | list[list[float]]:
        """A vector for an image or a text; a list of vectors for a list of them."""
        ...

    def close(self) -> None:
        """Free the model. Twice is fine."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Runtime(Protocol):
    """An engine: turns a model file into a Session, or a TensorSession."""

    def load(self, path: Path, params: LoadParams) -> Any:
        """Load a model file. A bad one ends in an EdgekitError, never in a dead process."""
        ...


# Of a bare file; any other is taken for a GGUF.
_FORMAT_OF_SUFFIX = {".onnx": "onnx", ".tflite": "tflite"}


def load(model: Artifact | str | Path, *, runtime: str | None = None, **fields: Any) -> Any:
    """Load an Artifact, a path to one, or a GGUF, ONNX or TFLite file; keyword arguments as in
    LoadParams.

    A language model is a Session, any other model a TensorSession.
    ``runtime`` None takes the one that the artifact was tuned for, if it is installed, or the one
    for the model's format. An adapter that the artifact ships is
    applied with scale 1, unless ``adapters`` names its file too, with a scale of its own.
    A file that the engine never loaded before is first loaded in a child process, so that a hostile
    one cannot take this process down: nobody signs manifests, so that holds for artifacts as well.
    Raises ManifestError, CorruptArtifactError, LoadError, UsageError, MissingExtraError.
    """
    try:
        params = LoadParams(**fields)
    except TypeError as error:
        raise UsageError(f"load() {str(error).partition(') ')[2]}") from None
    if isinstance(model, str | Path):
        path = Path(model)
        if path.is_file():
            model_format = _FORMAT_OF_SUFFIX.get(path.suffix.lower(), "gguf")
            return _engine(runtime, model_format).load(path, params)
        model = Artifact.open(path)
    if not isinstance(model, Artifact):
        raise UsageError(
            f"cannot load a {type(model).__name__}; give an artifact, its folder or a model file"
        )
    engine = _engine(runtime or runtime_of(model), model.format)
    model.verify_sizes()
    adapters = (*_shipped_adapters(model, params), *params.adapters)
    return engine.load(model.model_path, replace(params, adapters=adapters))


def runtime_of(artifact: Artifact) -> str | None:
    """The runtime that ``artifact`` was found fastest in (``--optimize-for``), where it is
    installed; else the one for its format. None where there is none.
    """
    usual = RUNTIME_OF_FORMAT.get(artifact.format)
    others = OTHER_RUNTIMES.get(artifact.format)
    tuning = Receipt.from_dict(artifact.receipt).tuning if others else None
    if others and tuning and tuning.runtime in others and RUNTIMES.installed(tuning.runtime):
        return tuning.runtime
    return usual


def _engine(name: str | None, model_format: str) -> Runtime:
    """The runtime called ``name``, or the one for ``model_format``."""
    name = name or RUNTIME_OF_FORMAT.get(model_format)
    if name is None:
        raise LoadError(
            f"edgekit has no runtime for the format {model_format!r}",
            hint=f"name one: {', '.join(RUNTIMES)}",
        )
    engine: Runtime = RUNTIMES.load(name)()
    return engine


def _shipped_adapters(artifact: Artifact, params: LoadParams) -> list[tuple[Path, float]]:
    """The adapters beside the model, but for those that the user gave a scale."""
    given = {os.path.realpath(file) for file, _ in params.adapters}
    shipped = [file.path for file in artifact.manifest.files if file.role == "adapter"]
    files = [_fs.contained(artifact.path, name) for name in shipped]
    return [(file, 1.0) for file in files if os.path.realpath(file) not in given]
