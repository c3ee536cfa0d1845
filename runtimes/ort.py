"""ONNX Runtime as a TensorSession: images, texts and bare tensors in, classes and vectors out.

Must never parse a model before edgekit's own reader has, nor print what the engine says of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekit import _fs, language_model, preprocess
from edgekit.errors import InferenceError, LoadError, UsageError
from edgekit.formats import onnx
from edgekit.formats.onnx import OnnxHeader
from edgekit.preprocess import Preprocessing
from edgekit.runtime import LoadParams, TensorSpec
from edgekit.runtimes import first_load, graph_threads, ort_lm, ort_start
from edgekit.runtimes.ort_bencher import OrtBencher
from edgekit.runtimes.ort_towers import TwoEncoders
from edgekit.runtimes.tensor_session import PreparedSession, check_params
from edgekit.runtimes.text_session import TextSession
from edgekit.runtimes.token_scorer import TokenScorer

# What the engine calls its types -> numpy's words.
_DTYPES = {
    "float": "float32",
    "float16": "float16",
    "double": "float64",
    "bool": "bool",
    "string": "str",
} | {f"{sign}int{bits}": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


class OrtRuntime:
    """The engine for ONNX files."""

    def load(self, path: Path, params: LoadParams) -> OrtSession | TextSession | TwoEncoders:
        """Load an ONNX file, the first time in a child process (``first_load``) before this one.
        A language model becomes a Session, any other model a TensorSession; of a model of two
        encoders both are loaded.

        Raises SourceError, CorruptArtifactError, UnsafePathError or VersionError for a bad file,
        EngineCrashedError or DeadlineError for one that kills or hangs the engine, LoadError for
        one that it refuses, UsageError for parameters of language models.
        """
        if language_model.is_one(path):
            return ort_lm.load(path, params)
        check_params(params)
        steps = preprocess.beside(path)
        if steps.matching is None:
            return self._load(path, params, steps)
        beside = _fs.contained(path.parent, steps.matching.text_model)
        image, text = preprocess.encoders(steps)
        first = self._load(path, params, image)
        return TwoEncoders(first, self._load(beside, params, text), steps.matching)

    def _load(self, path: Path, params: LoadParams, steps: Preprocessing) -> OrtSession:
        header = onnx.read(path)
        files = [path, *(path.parent / name for name in header.beside)]
        # An optimized graph of floats loads no faster, and answers later (docs/onnx.md, Runtimes).
        kept = ort_start.key(files) if _is_quantized(header) else ""
        first_load.pass_once(
            files,
            "edgekit.runtimes.ort:attempt",
            {"path": str(path.absolute()), "kept": kept},
            ort_start.engine(),
        )
        threads = params.n_threads or graph_threads.fastest(
            header, ort_start.engine(), lambda count: _trial(path, count, kept)
        )
        return OrtSession(path, threads, steps, kept)

    def bencher(
        self,
        path: Path,
        *,
        n_ctx: int,
        n_batch: int = 512,
        threads: int,
        kv_type: str = "f32",
        flash_attention: bool = True,
        n_seqs: int = 1,
    ) -> OrtBencher:
        """A language model for a stopwatch: only in a child process of edgekit."""
        return OrtBencher(
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
        """A language model that scores text (``edgekit.scorer``): only in a child of
        ``_proc.call``. Raises UsageError for other models, and for adapters.
        """
        if not language_model.is_one(path):
            raise UsageError(f"{path} is no language model: it scores no text")
        if adapters:
            raise UsageError("an ONNX language model takes no adapters")
        return ort_lm.scorer(path, n_ctx=n_ctx, threads=threads)


def _is_quantized(header: OnnxHeader) -> bool:
    """Whether weights are stored in 8 or 4 bits."""
    return any(tensor.dtype.endswith(("int8", "int4")) for tensor in header.initializers)


def attempt(path: str, kept: str) -> None:
    """In the child: load, and keep what the optimizer made for the parent and for later loads."""
    ort_start.started(Path(path), 1, kept)


def _trial(path: Path, threads: int, kept: str) -> float | None:
    session = ort_start.started(path, threads, kept)
    feeds = graph_threads.zeros([_spec(each) for each in session.get_inputs()])
    return graph_threads.timed(lambda: session.run(None, feeds))


def _spec(found: Any) -> TensorSpec:
    try:
        kind = str(found.type).removeprefix("tensor(").removesuffix(")")
        return TensorSpec(found.name, _DTYPES.get(kind, kind), tuple(found.shape))
    except UnicodeDecodeError:  # some mutants name an axis so, and the engine takes them
        raise LoadError("an input or output of the model has a name that is no UTF-8") from None


class OrtSession(PreparedSession):
    """A graph in ONNX Runtime."""

    def __init__(self, path: Path, threads: int, steps: Preprocessing, kept: str) -> None:
        """``steps`` make the inputs; ``kept`` as in ``ort_start``. Raises LoadError."""
        super().__init__(path, steps)
        self.threads = threads
        self._session = ort_start.started(path, threads, kept)
        self.inputs = tuple(map(_spec, self._session.get_inputs()))
        self.outputs = tuple(map(_spec, self._session.get_outputs()))

    def _answers(self, feeds: dict[str, Any]) -> list[Any]:
        try:
            found: list[Any] = self._session.run(None, feeds)
        except Exception as error:
            raise InferenceError(f"ONNX Runtime failed: {ort_start.reason(error)}") from None
        return found

    def _let_go(self) -> None:
        self._session = None
