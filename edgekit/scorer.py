"""Scoring text: what an engine must offer for it, and which files make up a model to score.

Knows no engine and no statistics; arrays are numpy's, but nothing here looks into one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from edgekit import _fs
from edgekit.artifact import Artifact
from edgekit.errors import LoadError
from edgekit.registry import RUNTIME_OF_FORMAT, RUNTIMES

# What an engine reads at once, so that two scorers give blocks of the same rows.
BLOCK_TOKENS = 512
# The mapped file, a repacked copy of its weights, and one more for what the header may hide.
_FILE_COPIES = 3
_ENGINE_BYTES = 4 << 30
# The KV cache and the logits of one position, even of a model with 100 layers and 262,144 tokens.
_POSITION_BYTES = 4 << 20


class Scorer(Protocol):
    """A loaded model that tells how likely it finds every next token. Close it, or use ``with``.

    Not thread-safe, and meant for a child process: a bad file may crash the engine.
    """

    n_vocab: int
    n_ctx: int
    # The token that begins every text; None where the model wants none.
    bos: int | None

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids without BOS; control tokens are recognised only with ``special``."""
        ...

    def logits(self, tokens: Sequence[int], first: int) -> Any:
        """Logits after positions ``first`` and on, float32 [len(tokens) - first, n_vocab].

        ``tokens`` is one fresh text from position 0 on, of at most n_ctx tokens, with the BOS that
        the caller put there. A view, valid until the next call. Raises UsageError,
        PromptTooLongError, InferenceError.
        """
        ...

    def blocks(self, tokens: Sequence[int], first: int) -> Iterator[Any]:
        """``logits`` in pieces, so that a long text needs little memory.

        Each piece holds the rows from ``first`` on among the next BLOCK_TOKENS positions, and is
        valid until the next one is asked for; a block without such rows gives no piece.
        """
        ...

    def log_likelihoods(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """For each continuation of ``context``: ln of its probability, and whether it is greedy.

        The probability is the product over its tokens, in nats; greedy means that each of them is
        the model's first choice. ``context`` and each continuation hold at least one token, and
        both together fit n_ctx. The context is read once for all of them. Raises as ``logits``.
        """
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


@dataclass(frozen=True)
class ModelFiles:
    """What a scorer loads. Only text, so that ``vars(files)`` can travel to a child process."""

    runtime: str
    path: str
    adapters: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        beside = Path(f"{self.path}.data")  # an ONNX file's weights, where they are large
        files = [Path(self.path), *map(Path, self.adapters)]
        return sum(file.stat().st_size for file in [*files, *[beside] * beside.is_file()])

    def open(self, *, n_ctx: int = 512, threads: int | None = None) -> Scorer:
        """Load the model with its adapters (scale 1). Only inside a child of ``_proc.call``.

        ``threads`` None: the count that was measured fastest. Raises UsageError (n_ctx above the
        trained one, a runtime that scores nothing), LoadError and what reading a header raises.
        """
        runtime = RUNTIMES.load(self.runtime)()
        if not hasattr(runtime, "scorer"):
            raise LoadError(f"the runtime '{self.runtime}' cannot score text")
        adapters = tuple(Path(file) for file in self.adapters)
        scorer: Scorer = runtime.scorer(
            Path(self.path), n_ctx=n_ctx, threads=threads, adapters=adapters
        )
        return scorer


def model_files(model: str | Path) -> ModelFiles:
    """The files of an artifact (its folder), with the adapters that it ships, or of a model file.

    Raises ManifestError, CorruptArtifactError, or LoadError for a format that no runtime loads.
    """
    path = Path(model).absolute()
    if path.is_file() and path.name != "manifest.json":
        kind = "onnx" if path.suffix.lower() == ".onnx" else "gguf"
        return ModelFiles(RUNTIME_OF_FORMAT[kind], str(path))
    artifact = Artifact.open(path)
    if artifact.format not in RUNTIME_OF_FORMAT:
        raise LoadError(f"edgekit has no runtime for the format {artifact.format!r}")
    artifact.verify_sizes()
    shipped = [file.path for file in artifact.manifest.files if file.role == "adapter"]
    return ModelFiles(
        RUNTIME_OF_FORMAT[artifact.format],
        str(artifact.model_path),
        tuple(str(_fs.contained(artifact.path, name)) for name in shipped),
    )


def memory_limit(models: Sequence[ModelFiles], n_ctx: int) -> int:
    """How much address space, in bytes, a child may take that scores with all these models."""
    sizes = sum(model.size_bytes for model in models)
    return _FILE_COPIES * sizes + len(models) * n_ctx * _POSITION_BYTES + _ENGINE_BYTES
