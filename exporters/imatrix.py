"""The importance matrix: how strongly each input column of each weight matrix is used.

Computed on the engine itself, from the squared activations over a calibration text, and kept in
llama.cpp's own GGUF form (github.com/ggml-org/llama.cpp, tools/imatrix). Knows GGUF models and
text; never recipes or quantization types.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from edgekit import _fs, _proc
from edgekit.errors import ArtifactError, ExportError, LoadError, RecipeError, SourceError
from edgekit.exporters.quantizer import SILENCE_S, memory_limit
from edgekit.formats import gguf
from edgekit.ggml_tensor import TYPE_F32, Tensor, op_name
from edgekit.llama_library import backend_file, libllama, recent_log
from edgekit.recipe import Calibration

BUILTIN = "builtin"
DEFAULT_CHUNKS = 32
_CHUNK_TOKENS = 512
_MAX_TEXT_BYTES = 64 << 20
_BACKEND_KEY = "edgekit.backend"
_ALGORITHM = 1  # part of the cache key: raise it when the figures would change

# A row gets an output only where one is asked for, and every output costs a product with the whole
# vocabulary: a fifth of all work in a small model. The last layer's feed-forward part computes
# only these rows. Which ones changes from chunk to chunk, for the first token of a text is unlike
# all others (Massive Activations, https://arxiv.org/abs/2402.17762) and must not count more.
_OUTPUT_EVERY = 8
_OP_MUL_MAT = "MUL_MAT"


def calibration(choice: str | Path, chunks: int | None) -> tuple[Calibration, bytes]:
    """The calibration that a user's choice ("builtin" or a text file) names, and its text.

    Raises RecipeError when the file cannot be read, is not UTF-8 or is larger than 64 MiB.
    """
    if str(choice) == BUILTIN:
        text = resources.files("edgekit.exporters").joinpath("calibration.txt").read_bytes()
        name = BUILTIN
    else:
        try:
            with Path(choice).open("rb") as file:
                text = file.read(_MAX_TEXT_BYTES + 1)
            text.decode("utf-8")
        except OSError as error:
            raise RecipeError(
                f"cannot read the calibration text {choice}: {error.strerror}",
                hint="give a text file, 'builtin' or 'none'",
            ) from None
        except UnicodeDecodeError:
            raise RecipeError(f"the calibration text {choice} is not UTF-8") from None
        if len(text) > _MAX_TEXT_BYTES:
            raise RecipeError(f"the calibration text {choice} is larger than 64 MiB")
        name = Path(choice).name
    digest = hashlib.sha256(text).hexdigest()
    return Calibration(name, digest, chunks or DEFAULT_CHUNKS, _CHUNK_TOKENS), text


def cached(model_key: dict[str, str], calibration: Calibration) -> tuple[Path, bool]:
    """Where the importance matrix of a model over a text is kept, and whether it is there already.

    ``model_key`` holds the hashes that identify the model's weights.
    """
    key = json.dumps([_ALGORITHM, model_key, asdict(calibration)], sort_keys=True)
    path = _fs.home("cache") / "imatrix" / f"{hashlib.sha256(key.encode()).hexdigest()}.gguf"
    try:
        return path, _BACKEND_KEY in gguf.read(path).metadata
    except (ArtifactError, SourceError):
        return path, False


def compute(
    model: Path,
    calibration: Calibration,
    text: bytes,
    out: Path,
    on_chunk: Callable[[int, int], None],
) -> None:
    """Write the importance matrix of a GGUF model over ``text`` to ``out``.

    ``on_chunk`` hears (done, total). Raises ExportError when the text is too short, LoadError when
    the engine refuses the model.
    """
    with _fs.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=out.parent) as folder:
            scratch, partial = Path(folder) / "text", Path(folder) / "imatrix.gguf"
            scratch.write_bytes(text)
            _proc.call(
                "edgekit.exporters.imatrix:_compute",
                {
                    "model": str(model),
                    "text": str(scratch),
                    "out": str(partial),
                    "chunks": calibration.chunks,
                    "chunk_tokens": calibration.chunk_tokens,
                    "name": calibration.text,
                },
                silence_s=SILENCE_S,
                memory_bytes=memory_limit(model),
                what="computing the importance matrix",
                on_report=lambda message: on_chunk(*message),
            )
            _fs.publish(partial, out)


def read(path: Path) -> dict[str, Any]:
    """Weight name -> mean squared activation per input column, float32 arrays of (columns,)."""
    import numpy as np

    header = gguf.read(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")

    def floats(name: str) -> Any:
        tensor = header.tensor(name)
        return data[tensor.offset : tensor.offset + tensor.size_bytes].view(np.float32)

    names = [t.name.removesuffix(".in_sum2") for t in header.tensors if t.name.endswith(".in_sum2")]
    return {
        name: np.ascontiguousarray(floats(f"{name}.in_sum2") / floats(f"{name}.counts")[0])
        for name in names
    }


def facts(path: Path) -> dict[str, Any]:
    """How a matrix came to be: the text's name, the chunks used, the engine's CPU backend."""
    metadata = gguf.read(path).metadata
    return {
        "text": metadata["imatrix.datasets"][0],
        "chunks": metadata["imatrix.chunk_count"],
        "backend": metadata[_BACKEND_KEY],
    }


class _Collector:
    """Sums squared inputs of every block's matrix products, as the engine computes them."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._rows: dict[str, int] = {}
        self._same: dict[str, str] = {}
        self._asked: tuple[int, str] = (0, "")

    def __call__(self, pointer: int, asking: bool, _user_data: Any) -> bool:
        """The engine's evaluation callback: first "do you want this node?", then its data."""
        tensor = Tensor.at(pointer)
        if asking:
            return self._wanted(tensor)
        self._add(tensor)
        return True

    def entries(self) -> dict[str, tuple[Any, int]]:
        """Weight name -> (sums of squares per column, rows summed), sorted by name."""
        own = {name: (self._sums[name], self._rows[name]) for name in self._sums}
        return dict(sorted((own | {n: own[first] for n, first in self._same.items()}).items()))

    def _wanted(self, tensor: Tensor) -> bool:
        if op_name(tensor.op) != _OP_MUL_MAT:
            return False
        weight, inputs = tensor.source(0), tensor.source(1)
        if not weight.name.startswith(b"blk.") or inputs.type != TYPE_F32:
            return False
        name = weight.name.decode()
        # Query, key and value read one input, gate and up another: each stop of the engine costs
        # a synchronization, so the followers share the figures of the first.
        if self._asked[0] == tensor.src[1]:
            self._same[name] = self._asked[1]
            return False
        self._asked = (tensor.src[1], name)
        return True

    def _add(self, tensor: Tensor) -> None:
        import numpy as np

        weight, inputs = tensor.source(0), tensor.source(1)
        columns, rows = inputs.ne[0], inputs.ne[1]
        pointer = ctypes.cast(inputs.data, ctypes.POINTER(ctypes.c_float))
        values = np.ctypeslib.as_array(pointer, shape=(rows, inputs.nb[1] // 4))[:, :columns]
        name = weight.name.decode()
        squares = np.einsum("rc,rc->c", values, values).astype(np.float64)
        self._sums[name] = self._sums.get(name, 0) + squares
        self._rows[name] = self._rows.get(name, 0) + rows


@contextmanager
def _context(model: str, chunk_tokens: int, collector: Any) -> Iterator[tuple[Any, Any]]:
    """A loaded model and a context whose every graph node passes the collector."""
    llama = libllama()
    model_params = llama.llama_model_default_params()
    model_params.n_gpu_layers = 0  # activations are read where they lie, so they must lie in RAM
    loaded = llama.llama_model_load_from_file(model.encode(), model_params)
    if not loaded:
        raise LoadError(f"llama.cpp refused the model: {(recent_log() or ['no reason given'])[-1]}")
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = chunk_tokens
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    params.cb_eval = llama.ggml_backend_sched_eval_callback(collector)
    context = llama.llama_init_from_model(loaded, params)
    try:
        if not context:
            raise LoadError("llama.cpp could not make a context for the importance matrix")
        yield loaded, context
    finally:
        if context:
            llama.llama_free(context)
        llama.llama_model_free(loaded)


def _compute(model: str, text: str, out: str, chunks: int, chunk_tokens: int, name: str) -> None:
    """Child side of ``compute``: tokenize, run every chunk on its own, write the sums."""
    import numpy as np

    llama = libllama()
    collector = _Collector()
    with _context(model, chunk_tokens, collector) as (loaded, context):
        vocab = llama.llama_model_get_vocab(loaded)
        tokens = _tokenize(vocab, Path(text).read_bytes())
        available = len(tokens) // chunk_tokens
        if available < 2:
            raise ExportError(
                f"the calibration text has {len(tokens)} tokens, not even {2 * chunk_tokens}",
                hint="give a longer --calibration text",
            )
        chunks = min(chunks, available)
        # Spread over the whole text, so that fewer chunks still see all of its kinds.
        starts = np.linspace(0, available - 1, chunks).astype(int) * chunk_tokens
        batch = llama.llama_batch_init(chunk_tokens, 0, 1)
        for done, start in enumerate(starts, 1):
            _fill(batch, tokens[start : start + chunk_tokens], done)
            if llama.llama_vocab_get_add_bos(vocab):
                batch.token[0] = llama.llama_vocab_bos(vocab)
            llama.llama_memory_clear(llama.llama_get_memory(context), True)
            if llama.llama_decode(context, batch):
                raise ExportError("llama.cpp failed while computing the importance matrix")
            _proc.report([done, chunks])
        llama.llama_batch_free(batch)
    entries = collector.entries()
    for tensor, (sums, _) in entries.items():
        if not np.isfinite(sums).all():
            raise ExportError(f"the model's activations at {tensor} are not finite")
    with _fs.disk_errors(Path(out)):
        _write(Path(out), entries, name, chunks, chunk_tokens)


def _fill(batch: Any, tokens: Any, number: int) -> None:
    """Chunk ``number`` as one sequence from position 0, with an output for every eighth row."""
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = int(token)
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = (position + number) % _OUTPUT_EVERY == 0


def _tokenize(vocab: Any, text: bytes) -> Any:
    import numpy as np

    llama = libllama()
    room = len(text) + 8
    buffer = (llama.llama_token * room)()
    count = llama.llama_tokenize(vocab, text, len(text), buffer, room, False, False)
    return np.ctypeslib.as_array(buffer)[:count].copy()


def _write(
    path: Path, entries: dict[str, tuple[Any, int]], name: str, chunks: int, chunk_tokens: int
) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [name])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_string(_BACKEND_KEY, backend_file() or "fixed")
    writer.add_uint32("imatrix.chunk_size", chunk_tokens)
    for tensor, (sums, rows) in entries.items():
        writer.add_tensor(f"{tensor}.in_sum2", sums.astype(np.float32)[None])
        writer.add_tensor(f"{tensor}.counts", np.array([[rows]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
