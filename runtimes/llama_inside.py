"""What every matrix of a GGUF file computes, read inside llama.cpp while it reads a text.

Knows the engine's graph by the names of weights and of the residual stream; never another model,
and it writes no file. Only for a child process: it does no first-load check.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import InferenceError
from edgekit.formats import gguf
from edgekit.formats.gguf import GgufHeader
from edgekit.ggml_tensor import TYPE_F32, Tensor, op_name
from edgekit.runtime import LoadParams
from edgekit.runtimes import threads as thread_counts
from edgekit.runtimes.llama_activations import WatchedEngine

Values = dict[str, np.ndarray[Any, np.dtype[np.float32]]]

# The residual stream behind a layer's attention, and behind the layer; Gemma's own name for it.
_STREAMS = re.compile(r"(ffn_inp|sa_out|l_out)-(\d+)")
EMBEDDED = "embedded"  # what the table of embeddings gives, which may be the head's matrix as well


class Inside:
    """A loaded GGUF file whose values can be seen."""

    def __init__(self, path: Path, *, n_ctx: int, threads: int | None = None) -> None:
        """Raises LoadError, and what reading a header raises."""
        self._header = gguf.read(path)
        # Values are read where they lie, so they must lie in RAM.
        params = LoadParams(n_ctx=n_ctx, n_batch=n_ctx, n_gpu_layers=0)
        self._recorder = _Recorder()
        count = threads or thread_counts.first_guess()[1]
        self.engine = WatchedEngine(path, self._header, params, count, self._recorder)

    def values(self, tokens: Sequence[int], given: Mapping[str, Any] | None = None) -> Values:
        """Of one fresh text: float32 [tokens, values] by the name of the weight that makes them,
        with its bias, or by that of the stream ("ffn_inp-3", "l_out-3", EMBEDDED).

        What ``given`` holds of the same names replaces the stream once it was noted, so that every
        layer after it reads that. Queries and keys are in the order of Hugging Face's files.
        Raises InferenceError.
        """
        self._recorder.begin(given or {})
        self.engine.forget(0)
        # The last layer computes only the tokens that have outputs.
        self.engine.decode(list(tokens), 0, outputs=len(tokens))
        found = self._recorder.end()
        return {name: self._in_hf_order(name, values) for name, values in found.items()}

    def _in_hf_order(self, name: str, values: Any) -> Any:
        """llama.cpp turns neighbours of llama's heads, Hugging Face's classes the halves."""
        kind = name.partition(".attn_")[2]
        if self._header.architecture != "llama" or kind not in ("q.weight", "k.weight"):
            return values
        heads = _heads(self._header, "head_count" if kind[0] == "q" else "head_count_kv")
        apart = values.reshape(len(values), heads, -1, 2)
        return apart.swapaxes(2, 3).reshape(values.shape)


def _heads(header: GgufHeader, key: str) -> int:
    found = header.metadata.get(
        f"llama.attention.{key}", header.metadata["llama.attention.head_count"]
    )
    return int(found)


class _Recorder:
    """The engine's evaluation callback: first "do you want this node?", then its data."""

    def __init__(self) -> None:
        self.begin({})

    def begin(self, given: Mapping[str, Any]) -> None:
        self._given = given
        self._values: Values = {}
        self._makers: dict[int, str] = {}  # address of a product -> its weight
        self._error: Exception | None = None

    def end(self) -> Values:
        """What was seen. Raises InferenceError for what went wrong inside the engine's call."""
        if self._error is not None:
            raise InferenceError(f"the values inside cannot be read: {self._error}")
        return self._values

    def __call__(self, pointer: int, asking: bool, _user_data: Any) -> bool:
        # An exception would be printed, and lost, where C code called.
        try:
            tensor = Tensor.at(pointer)
            name = self._name(tensor, _address(pointer))
            if asking or name is None:
                return name is not None
            self._note(name, tensor)
        except Exception as error:
            self._error = self._error or error
        return True

    def _name(self, tensor: Tensor, address: int) -> str | None:
        if tensor.type != TYPE_F32:
            return None
        op = op_name(tensor.op)
        if op in ("MUL_MAT", "GET_ROWS"):
            weight = str(tensor.source(0).name, "utf-8", "replace")
            if not weight.endswith(".weight"):
                return None
            if op == "GET_ROWS":
                return EMBEDDED if weight == "token_embd.weight" else None
            self._makers[address] = weight
            return weight
        if op == "ADD" and tensor.source(1).name.endswith(b".bias"):
            return self._makers.get(tensor.src[0])
        own = str(tensor.name, "utf-8", "replace")
        return own if op == "ADD" and _STREAMS.fullmatch(own) else None

    def _note(self, name: str, tensor: Tensor) -> None:
        columns, rows = tensor.ne[0], tensor.ne[1]
        if tensor.nb[1] != 4 * columns:
            raise ValueError(f"{name} does not lie in one piece")
        pointer = ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_float))
        values = np.ctypeslib.as_array(pointer, shape=(rows, columns))
        self._values[name] = values.copy()
        if name in self._given:
            values[:] = self._given[name]


def _address(pointer: Any) -> int:
    return (
        pointer
        if isinstance(pointer, int)
        else int(ctypes.cast(pointer, ctypes.c_void_p).value or 0)
    )
