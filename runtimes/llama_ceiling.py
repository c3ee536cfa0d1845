"""What the engine's kernels reach at best: one product of each tensor type, one empty operator.

Knows ggml's graphs (ggml.h, ggml-backend.h), not models or files. Must only run in a child process,
for ggml ends the process when it is asked for what it cannot do.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Iterator, Sequence
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
# The same from memory: matrices as a small model has them, one after the other.
_STREAM_SHAPE, _STREAM_COLUMNS = (1024, 1024), 1
# Small operators as they stand in a model: between products whose weights empty the caches.
_OPERATORS_BETWEEN, _BETWEEN_TYPE, _EPSILON = 2, "Q8_0", 1e-5
_BETWEEN_BYTES = 16 << 20  # a run of a millisecond or two: among many there are quiet ones
_SAMPLE_ROWS = 16
_LEAST_OPERATOR_S = 2e-8  # two figures that are alike say nothing of their difference
_ROUNDS = 2
_BUDGET_S = 0.4
_PAIRED_S = 0.8


class _InitParams(ctypes.Structure):
    """``ggml_init_params`` of ggml.h."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def product_flops(type_name: str, n_threads: int, stream_bytes: int) -> tuple[float, float, float]:
    """FLOP per second of ``type_name`` weights times float32 columns: 512 columns, one column with
    weights in the cache, and one column with ``stream_bytes`` of weights, each read once.

    The weights lie as the engine would keep a model's, repacked where it repacks them. The best of
    a few rounds, in about two seconds.
    """
    prefill = _Product(type_name, _PREFILL_SHAPE, _PREFILL_COLUMNS, _PREFILL_TIMES, n_threads)
    row_bytes = TYPES[_NUMBERS[type_name]].size_bytes(_DECODE_WIDTH)
    rows = _DECODE_BYTES // row_bytes // _SAMPLE_ROWS * _SAMPLE_ROWS
    shape = _DECODE_WIDTH, rows
    decode = _Product(type_name, shape, _DECODE_COLUMNS, _DECODE_TIMES, n_threads)
    copies = _copies(type_name, stream_bytes)
    stream = _Product(type_name, _STREAM_SHAPE, _STREAM_COLUMNS, 1, n_threads, copies)
    return prefill.flops_s(), decode.flops_s(), stream.flops_s()


def operator_s(n_threads: int) -> float:
    """Seconds of a norm or an addition of one small row, as they stand between the products of a
    model: dispatch, the barrier behind it, and what has to be fetched anew, for the weights that
    are read between have emptied the nearer caches.

    Many in a row would take a tenth of it each: their code and their rows would stay at hand.
    """
    copies = _copies(_BETWEEN_TYPE, _BETWEEN_BYTES)
    work = _Product(_BETWEEN_TYPE, _STREAM_SHAPE, _STREAM_COLUMNS, 1, n_threads, copies)
    with work.prepared(between=(0, _OPERATORS_BETWEEN)) as runs:
        plain_s, mixed_s = _fastest_in_turn(runs)
    return max((mixed_s - plain_s) / (copies * _OPERATORS_BETWEEN), _LEAST_OPERATOR_S)


def _copies(type_name: str, stream_bytes: int) -> int:
    """How many matrices of _STREAM_SHAPE have so many bytes."""
    width, height = _STREAM_SHAPE
    return max(1, stream_bytes // (TYPES[_NUMBERS[type_name]].size_bytes(width) * height))


class _Product:
    """``times`` products, one after the other, of each of ``copies`` weight matrices with the same
    columns.
    """

    def __init__(
        self,
        type_name: str,
        shape: tuple[int, int],
        columns: int,
        times: int,
        n_threads: int,
        copies: int = 1,
    ) -> None:
        self._type = _NUMBERS[type_name]
        self._shape = shape
        self._columns = columns
        self._times = times
        self._copies = copies
        self._n_threads = n_threads

    def flops_s(self) -> float:
        width, height = self._shape
        with self.prepared() as (run,):
            seconds = _fastest(run)
        return 2.0 * width * height * self._columns * self._copies * self._times / seconds

    @contextmanager
    def prepared(self, between: Sequence[int] = (0,)) -> Iterator[list[Callable[[], None]]]:
        """All of it in memory, ready to run again and again; for each count of ``between`` a way
        with so many small operators behind each product.
        """
        ggml = _ggml()
        width, height = self._shape
        products = self._copies * self._times
        with (
            ExitStack() as stack,
            _context(self._copies) as weights,
            _context(1) as given,
            _backend(self._n_threads) as backend,
        ):
            matrices = [
                ggml.ggml_new_tensor_2d(weights, self._type, width, height)
                for _ in range(self._copies)
            ]
            inputs = ggml.ggml_new_tensor_2d(given, TYPE_F32, width, self._columns)
            graphs = []
            for count in between:
                context = stack.enter_context(_context(products * (1 + count)))
                outputs = [
                    ggml.ggml_mul_mat(context, matrix, inputs)
                    for matrix in matrices
                    for _ in range(self._times)
                ]
                first = outputs[0]
                ends = [_followed(context, output, inputs, count) for output in outputs]
                graphs.append((context, _graph(context, ends, products * (1 + count))))
            _allocate(weights, _weight_memory(matrices[0], first, stack), stack, weights=True)
            _allocate(given, _plain_memory(), stack)
            for context, _ in graphs:
                _allocate(context, _plain_memory(), stack)
            packed = _weight_bytes(self._type, width, height)
            for matrix in matrices:
                _set(matrix, packed)
            random = np.random.default_rng(0)
            _set(inputs, random.standard_normal(width * self._columns, np.float32).tobytes())
            yield [functools.partial(_run, backend, graph) for _, graph in graphs]


def _followed(context: Any, output: Any, row: Any, count: int) -> Any:
    """``output`` with so many norms and additions of ``row`` behind it; both have one size."""
    for number in range(count):
        if number % 2:
            output = _ggml().ggml_add(context, output, row)
        else:
            output = _ggml().ggml_rms_norm(context, output, _EPSILON)
    return output


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
        best = min(best, _timed(run))
        rounds += 1
    return best


def _fastest_in_turn(runs: Sequence[Callable[[], None]]) -> list[float]:
    """``_fastest`` of each; they alternate, so that what disturbs one disturbs all."""
    best = [_fastest(run) for run in runs]
    began = time.perf_counter()
    while time.perf_counter() - began < _PAIRED_S:
        for number, run in enumerate(runs):
            best[number] = min(best[number], _timed(run))
    return best


def _timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


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
        "ggml_add": (pointer, [pointer] * 3),
        "ggml_rms_norm": (pointer, [pointer, pointer, ctypes.c_float]),
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
