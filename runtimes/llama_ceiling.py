"""What the engine's kernels reach at best: one product of each tensor type, one empty operator.

Knows ggml's graphs (ggml.h, ggml-backend.h), not models or files. Must only run in a child process,
for ggml ends the process when it is asked for what it cannot do.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from edgekit.errors import LoadError
from edgekit.formats.ggml_types import TYPES
from edgekit.ggml_tensor import TYPE_F32, Tensor
from edgekit.llama_library import ggml_library, libllama, libllama_folder

_NUMBERS = {kind.name: number for number, kind in TYPES.items()}
_CPU, _WEIGHTS = 0, 1  # GGML_BACKEND_DEVICE_TYPE_CPU, GGML_BACKEND_BUFFER_USAGE_WEIGHTS

# Prefill: large enough that the kernel, and not its start, takes the time.
_PREFILL_SHAPE, _PREFILL_COLUMNS, _PREFILL_TIMES = (2048, 1024), 512, 1
# Decode: weights that stay in the second cache, which has 512 KiB on most CPUs and boards.
# From the third one a wide type would be as slow as from memory, and that is another roof.
_DECODE_WIDTH, _DECODE_BYTES, _DECODE_COLUMNS, _DECODE_TIMES = 1024, 256 << 10, 1, 64
_OPERATORS = 4000
_WIDTH = 576
_SAMPLE_ROWS = 16
_ROUNDS = 2
_BUDGET_S = 0.4


class _InitParams(ctypes.Structure):
    """``ggml_init_params`` of ggml.h."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def product_flops(type_name: str, n_threads: int) -> tuple[float, float]:
    """FLOP per second of ``type_name`` weights times float32 columns: (512 columns, one column).

    The weights lie as the engine would keep a model's, repacked where it repacks them. The best of
    a few rounds, in about a second.
    """
    prefill = _Product(type_name, _PREFILL_SHAPE, _PREFILL_COLUMNS, _PREFILL_TIMES, n_threads)
    row_bytes = TYPES[_NUMBERS[type_name]].size_bytes(_DECODE_WIDTH)
    rows = _DECODE_BYTES // row_bytes // _SAMPLE_ROWS * _SAMPLE_ROWS
    shape = _DECODE_WIDTH, rows
    decode = _Product(type_name, shape, _DECODE_COLUMNS, _DECODE_TIMES, n_threads)
    return prefill.flops_s(), decode.flops_s()


def operator_s(n_threads: int) -> float:
    """Seconds of one addition of two small rows: dispatch, and the barrier behind it."""
    ggml = _ggml()
    with _context(_OPERATORS + 2) as context, _backend(n_threads) as backend, ExitStack() as stack:
        zeros, last = (ggml.ggml_new_tensor_2d(context, TYPE_F32, _WIDTH, 1) for _ in range(2))
        first = last
        for _ in range(_OPERATORS):
            last = ggml.ggml_add_inplace(context, last, zeros)
        graph = _graph(context, [last], _OPERATORS)
        _allocate(context, _plain_memory(), stack)
        for row in (zeros, first):
            _set(row, np.zeros(_WIDTH, dtype=np.float32).tobytes())
        return _fastest(lambda: _run(backend, graph)) / _OPERATORS


class _Product:
    """``times`` products, one after the other, of one weight matrix with the same columns."""

    def __init__(
        self, type_name: str, shape: tuple[int, int], columns: int, times: int, n_threads: int
    ) -> None:
        self._type = _NUMBERS[type_name]
        self._shape = shape
        self._columns = columns
        self._times = times
        self._n_threads = n_threads

    def flops_s(self) -> float:
        ggml = _ggml()
        width, height = self._shape
        with (
            ExitStack() as stack,
            _context(1) as weights,
            _context(self._times + 1) as context,
            _backend(self._n_threads) as backend,
        ):
            weight = ggml.ggml_new_tensor_2d(weights, self._type, width, height)
            inputs = ggml.ggml_new_tensor_2d(context, TYPE_F32, width, self._columns)
            outputs = [ggml.ggml_mul_mat(context, weight, inputs) for _ in range(self._times)]
            graph = _graph(context, outputs, self._times)
            _allocate(weights, _weight_memory(weight, outputs[0], stack), stack, weights=True)
            _allocate(context, _plain_memory(), stack)
            _set(weight, _weight_bytes(self._type, width, height))
            random = np.random.default_rng(0)
            _set(inputs, random.standard_normal(width * self._columns, np.float32).tobytes())
            seconds = _fastest(lambda: _run(backend, graph))
        return 2.0 * width * height * self._columns * self._times / seconds


def _weight_bytes(type_number: int, width: int, height: int) -> bytes:
    """Random weights in their packed form: a few rows, many times, for packing is slow."""
    ggml = _ggml()
    kind = TYPES[type_number]
    rows = np.random.default_rng(1).standard_normal((_SAMPLE_ROWS, width), np.float32)
    packed = ctypes.create_string_buffer(kind.size_bytes(rows.size))
    importance = np.ones(width, dtype=np.float32)  # a few types cannot be packed without one
    ggml.ggml_quantize_chunk(
        type_number, rows.ctypes.data, packed, 0, _SAMPLE_ROWS, width, importance.ctypes.data
    )
    return packed.raw * (height // _SAMPLE_ROWS)


def _fastest(run: Callable[[], None]) -> float:
    """Seconds of the fastest of a few runs, the first of them left out."""
    run()
    began = time.perf_counter()
    best = float("inf")
    rounds = 0
    while rounds < _ROUNDS or time.perf_counter() - began < _BUDGET_S:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
        rounds += 1
    return best


# ggml


@functools.cache
def _ggml() -> Any:
    """libggml with the calls of this file declared; its functions live in two libraries."""
    libllama()  # loads the backends
    ggml = ggml_library()
    pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_2d": (pointer, [pointer, ctypes.c_int, number, number]),
        "ggml_mul_mat": (pointer, [pointer] * 3),
        "ggml_add_inplace": (pointer, [pointer] * 3),
        "ggml_new_graph_custom": (pointer, [pointer, size, ctypes.c_bool]),
        "ggml_build_forward_expand": (None, [pointer] * 2),
        "ggml_tensor_overhead": (size, []),
        "ggml_graph_overhead_custom": (size, [size, ctypes.c_bool]),
        "ggml_quantize_chunk": (
            size,
            [ctypes.c_int, pointer, pointer, number, number, number, pointer],
        ),
        "ggml_backend_dev_by_type": (pointer, [ctypes.c_int]),
        "ggml_backend_dev_init": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_dev_buffer_type": (pointer, [pointer]),
        "ggml_backend_dev_backend_reg": (pointer, [pointer]),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, [pointer] * 2),
        "ggml_backend_reg_get_proc_address": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_backend_buft_alloc_buffer": (pointer, [pointer, size]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, [pointer] * 2),
        "ggml_backend_buffer_set_usage": (None, [pointer, ctypes.c_int]),
        "ggml_backend_buffer_free": (None, [pointer]),
        "ggml_backend_tensor_set": (None, [pointer, ctypes.c_char_p, size, size]),
        "ggml_backend_graph_compute": (ctypes.c_int, [pointer] * 2),
        "ggml_backend_free": (None, [pointer]),
    }
    base = ctypes.CDLL(str(libllama_folder() / "libggml-base.so"))
    for name, (result, arguments) in signatures.items():
        function = getattr(ggml if hasattr(ggml, name) else base, name)
        function.restype, function.argtypes = result, arguments
    return ggml


@contextmanager
def _context(tensors: int) -> Iterator[Any]:
    """A place for the heads of so many tensors and a graph of them; their data lies elsewhere."""
    ggml = _ggml()
    room = (tensors + 2) * ggml.ggml_tensor_overhead()
    room += ggml.ggml_graph_overhead_custom(2 * tensors + 2, False)
    context = ggml.ggml_init(_InitParams(room, None, True))
    try:
        yield context
    finally:
        ggml.ggml_free(context)


@contextmanager
def _backend(n_threads: int) -> Iterator[Any]:
    ggml = _ggml()
    backend = ggml.ggml_backend_dev_init(_device(), None)
    set_threads = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(
        _cpu_address(b"ggml_backend_set_n_threads")
    )
    set_threads(backend, n_threads)
    try:
        yield backend
    finally:
        ggml.ggml_backend_free(backend)


def _device() -> Any:
    return _ggml().ggml_backend_dev_by_type(_CPU)


def _cpu_address(name: bytes) -> int:
    ggml = _ggml()
    registered = ggml.ggml_backend_dev_backend_reg(_device())
    address = ggml.ggml_backend_reg_get_proc_address(registered, name)
    if not address:
        raise LoadError("the CPU backend of llama.cpp is not the one this edgekit knows")
    return int(address)


def _plain_memory() -> Any:
    return _ggml().ggml_backend_dev_buffer_type(_device())


def _weight_memory(weight: Any, product: Any, stack: ExitStack) -> Any:
    """The first kind of memory in which the engine can use ``weight``, as its loader would choose.

    Special kinds come first: they repack weights for the CPU's own instructions.
    """
    ggml = _ggml()
    get_kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(
        _cpu_address(b"ggml_backend_dev_get_extra_bufts")
    )
    kinds = get_kinds(_device())
    for i in range(64):
        if not kinds or not kinds[i]:
            break
        probe = ggml.ggml_backend_buft_alloc_buffer(kinds[i], 0)
        stack.callback(ggml.ggml_backend_buffer_free, probe)
        Tensor.at(weight).buffer = probe
        fits = ggml.ggml_backend_dev_supports_op(_device(), product)
        Tensor.at(weight).buffer = None
        if fits:
            return kinds[i]
    return _plain_memory()


def _allocate(context: Any, kind: Any, stack: ExitStack, *, weights: bool = False) -> None:
    ggml = _ggml()
    buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
    stack.callback(ggml.ggml_backend_buffer_free, buffer)
    if weights:
        ggml.ggml_backend_buffer_set_usage(buffer, _WEIGHTS)


def _set(tensor: Any, data: bytes) -> None:
    _ggml().ggml_backend_tensor_set(tensor, data, 0, len(data))


def _graph(context: Any, outputs: list[Any], size: int) -> Any:
    ggml = _ggml()
    graph = ggml.ggml_new_graph_custom(context, 2 * size + 2, False)
    for output in outputs:
        ggml.ggml_build_forward_expand(graph, output)
    return graph


def _run(backend: Any, graph: Any) -> None:
    if _ggml().ggml_backend_graph_compute(backend, graph):
        raise LoadError("the engine could not compute a plain product")
