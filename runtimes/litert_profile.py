"""Where LiteRT spends its time: by kind of kernel, XNNPACK's own among them.

Knows the C interface of the engine's library, as its Python side has no profiler; never what the
figures are shown as.
Interface: https://github.com/google-ai-edge/LiteRT, litert/c: litert_compiled_model.h,
litert_tensor_buffer.h, litert_profiler.h and litert_profiler_event.h, as of version 2.3. Functions
have changed their arguments before, and a wrong one cannot be caught: no other version is asked.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from ctypes import byref, c_bool, c_char_p, c_int, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.formats import tflite
from edgekit.runtimes import litert

_VERSION = "2.3."
_RUNS = 20
_WARM_RUNS = 2
_ON_CPU = 1
_FOR_WRITING = 1
_MOST_RANK = 8
# An operator of the engine's own, and one of a delegate's (XNNPACK's kernels).
_OPERATOR, _KERNEL = 1 << 1, 1 << 3
_KINDS_OF_EVENTS = {1 << bit for bit in range(9)}
_HOLDERS = ("CALL", "CALL_ONCE", "IF", "WHILE")
# More than any event takes: none may be written beyond its end, whatever the library's version.
_ROOM_BYTES = 512


class _Refused(Exception):
    """The library does not do as its interface says."""


class _Layout(ctypes.Structure):
    _fields_ = [
        ("rank", c_uint32, 7),
        ("has_strides", c_uint32, 1),
        ("sides", c_int32 * _MOST_RANK),
        ("strides", c_uint32 * _MOST_RANK),
    ]


class _TensorType(ctypes.Structure):
    _fields_ = [("element", c_int), ("layout", _Layout)]


class _Event(ctypes.Structure):
    """A span of time. Memory is that before and after it."""

    _fields_ = [
        ("tag", c_char_p),
        ("kind", c_int),
        ("started_us", c_uint64),
        ("elapsed_us", c_uint64),
        ("memory", c_uint64 * 6),
        ("about", c_uint64 * 2),
        ("source", c_int),
    ]


def operators(path: Path, threads: int, feed: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """(kind of kernel, how many a run has, milliseconds in a run), the longest first; none where
    LiteRT's library is missing or of another version.

    A kind is the kernel's name and the types that it computes in: ``Fully Connected (NC, QS8,
    QC8W) GEMM``. The engine tells whole microseconds, so that kernels of less come out
    too short, or as nothing.
    """
    library = _library()
    if library is None:
        return []
    header = tflite.read(path)
    with litert.quiet(), ExitStack() as owned:
        try:
            graph = _Graph(_Library(library), owned, path, header, threads)
            pieces = list(_pieces(header, feed))
            for _ in range(_WARM_RUNS):
                graph.run(pieces)
            graph.start()
            for _ in range(_RUNS):
                graph.run(pieces)
            events = graph.events()
        except _Refused:
            return []
    return _summed(events)


def _library() -> Path | None:
    package = importlib.util.find_spec("ai_edge_litert")
    try:
        known = version("ai-edge-litert").startswith(_VERSION)
    except PackageNotFoundError:
        known = False
    if package is None or package.origin is None or not known:
        return None
    found = Path(package.origin).with_name("libLiteRt.so")
    return found if found.exists() else None


def _signature(header: tflite.TfliteHeader) -> int:
    """Which one calls the main graph by the names that edgekit gives its inputs. LiteRT makes one
    where a file has none.
    """
    for index, signature in enumerate(header.signatures):
        if signature.graph == 0 and signature.inputs == header.inputs:
            return index
    return 0


def _pieces(header: tflite.TfliteHeader, feed: Mapping[str, Any]) -> Iterator[dict[int, Any]]:
    """What one run is given, by the numbers of its tensors: a batch, or its inputs one by one where
    the graph takes no more (as a session does).
    """
    tensors = {name: header.main.tensors[number] for name, number in header.inputs.items()}
    single = bool(feed) and all(tensor.shape[:1] == (1,) for tensor in tensors.values())
    size = len(next(iter(feed.values()))) if single else 1
    for i in range(size):
        yield {
            header.inputs[name]: np.asarray(
                value[i : i + 1] if single else value, tensors[name].dtype, order="C"
            )
            for name, value in feed.items()
        }


def _summed(events: list[tuple[str, int]]) -> list[tuple[str, int, float]]:
    found: dict[str, tuple[int, int]] = {}
    for kind, elapsed_us in events:
        count, total_us = found.get(kind, (0, 0))
        found[kind] = count + 1, total_us + elapsed_us
    rows = [
        (kind, count // _RUNS, total_us / 1e3 / _RUNS) for kind, (count, total_us) in found.items()
    ]
    return sorted(rows, key=lambda row: -row[2])


class _Library:
    """The shared library: calls by name, and what they return checked."""

    def __init__(self, path: Path) -> None:
        """Raises _Refused."""
        try:
            self._functions = ctypes.CDLL(str(path))
        except OSError as error:
            raise _Refused(str(error)) from None
        self._c = ctypes.CDLL(None)
        self._c.malloc.restype, self._c.malloc.argtypes = c_void_p, [c_size_t]

    def call(self, name: str, *given: Any) -> None:
        """Raises _Refused for any status but success."""
        status = self._function(name, c_int)(*given)
        if status != 0:
            raise _Refused(f"{name}: {status}")

    def _function(self, name: str, gives: Any) -> Any:
        try:
            function = self._functions[f"LiteRt{name}"]
        except AttributeError:
            raise _Refused(f"it has no {name}") from None
        function.restype = gives
        return function

    def made(self, owned: ExitStack, kind: str, name: str, *given: Any) -> c_void_p:
        """A new object that the caller owns, destroyed when ``owned`` closes."""
        made, destroy = c_void_p(), self._function(f"Destroy{kind}", None)
        self.call(name, *given, byref(made))
        owned.callback(destroy, made)
        return made

    def found(self, name: str, *given: Any) -> c_void_p:
        """An object that another one owns."""
        seen = c_void_p()
        self.call(name, *given, byref(seen))
        return seen

    def set_options(self, options: c_void_p, of: bytes, toml: bytes) -> None:
        """Options of a part of the engine are a text, which the library frees by itself."""
        text = c_void_p(self._c.malloc(len(toml) + 1))
        ctypes.memmove(text, toml + b"\0", len(toml) + 1)
        release = ctypes.cast(self._c.free, c_void_p)
        self.call("AddOpaqueOptions", options, self.found("CreateOpaqueOptions", of, text, release))


class _Graph:
    """A compiled graph that takes its times."""

    def __init__(
        self,
        library: _Library,
        owned: ExitStack,
        path: Path,
        header: tflite.TfliteHeader,
        threads: int,
    ) -> None:
        """Raises _Refused."""
        self._library, self._owned = library, owned
        self._environment = library.made(owned, "Environment", "CreateEnvironment", c_int(0), None)
        model = library.made(
            owned, "Model", "CreateModelFromFile", self._environment, str(path).encode()
        )
        options = library.made(owned, "Options", "CreateOptions")
        library.call("SetOptionsHardwareAccelerators", options, c_int(_ON_CPU))
        library.set_options(options, b"runtime_options_string", b"enable_profiling = true\n")
        library.set_options(options, b"xnnpack", b"num_threads = %d\n" % threads)
        self._compiled = library.made(
            *(owned, "CompiledModel", "CreateCompiledModel", self._environment, model, options)
        )
        self._profiler = library.found("CompiledModelGetProfiler", self._compiled)
        self._signature = c_size_t(_signature(header))
        signature = library.found("GetModelSignature", model, self._signature)
        self._inputs = self._ends(signature, "Input")
        self._outputs = self._ends(signature, "Output")
        if {number for number, _ in self._inputs} != set(header.inputs.values()):
            raise _Refused("its signature has other inputs")
        self._shapes: list[tuple[int, ...]] | None = None

    def _ends(self, signature: c_void_p, which: str) -> list[tuple[int, _TensorType]]:
        """The numbers and types of the tensors that the graph takes or gives, in order."""
        count = c_size_t()
        self._library.call(f"GetNumSignature{which}s", signature, byref(count))
        found = []
        for index in range(count.value):
            tensor = self._library.found(
                f"GetSignature{which}TensorByIndex", signature, c_size_t(index)
            )
            number, kind = c_uint32(), _TensorType()
            self._library.call("GetTensorIndex", tensor, byref(number))
            self._library.call("GetRankedTensorType", tensor, byref(kind))
            found.append((number.value, kind))
        return found

    def run(self, pieces: list[dict[int, Any]]) -> None:
        """Run once on each piece. Raises _Refused."""
        for values in pieces:
            arrays = [values[number] for number, _ in self._inputs]
            shapes = [array.shape for array in arrays]
            if shapes != self._shapes:
                self._fit(shapes)
            for address, array in zip(self._given, arrays, strict=True):
                buffer, place, size = c_void_p(address), c_void_p(), c_size_t()
                self._library.call("GetTensorBufferPackedSize", buffer, byref(size))
                if size.value != array.nbytes:
                    raise _Refused(f"an input of {array.nbytes} bytes has room for {size.value}")
                self._library.call("LockTensorBuffer", buffer, byref(place), c_int(_FOR_WRITING))
                ctypes.memmove(place, array.ctypes.data, array.nbytes)
                self._library.call("UnlockTensorBuffer", buffer)
            self._library.call(
                "RunCompiledModel",
                *(self._compiled, self._signature),
                *(c_size_t(len(self._given)), self._given),
                *(c_size_t(len(self._answers)), self._answers),
            )

    def _fit(self, shapes: list[tuple[int, ...]]) -> None:
        """Make room for inputs of these shapes, and for what comes out then."""
        for index, (shape, (_, kind)) in enumerate(zip(shapes, self._inputs, strict=True)):
            if tuple(kind.layout.sides[: kind.layout.rank]) != shape:
                sides = (c_int * len(shape))(*shape)
                self._library.call(
                    "CompiledModelResizeInputTensor",
                    *(self._compiled, self._signature, c_size_t(index)),
                    *(sides, c_size_t(len(shape))),
                )
            self._library.call(
                "GetCompiledModelInputTensorLayout",
                *(self._compiled, self._signature, c_size_t(index), byref(kind.layout)),
            )
        layouts = (_Layout * len(self._outputs))()
        self._library.call(
            "GetCompiledModelOutputTensorLayouts",
            *(self._compiled, self._signature, c_size_t(len(layouts)), layouts, c_bool(True)),
        )
        for (_, kind), layout in zip(self._outputs, layouts, strict=True):
            kind.layout = layout
        self._given, self._answers = self._buffers("Input"), self._buffers("Output")
        self._shapes = shapes

    def _buffers(self, which: str) -> Any:
        ends = self._inputs if which == "Input" else self._outputs
        made = (c_void_p * len(ends))()
        for index, (_, kind) in enumerate(ends):
            needs = self._library.found(
                f"GetCompiledModel{which}BufferRequirements",
                *(self._compiled, self._signature, c_size_t(index)),
            )
            made[index] = self._library.made(
                *(self._owned, "TensorBuffer", "CreateManagedTensorBufferFromRequirements"),
                *(self._environment, byref(kind), needs),
            )
        return made

    def start(self) -> None:
        """Take times from now on."""
        self._library.call("StartProfiler", self._profiler)

    def events(self) -> list[tuple[str, int]]:
        """(kind, microseconds) of all kernels since ``start``. Raises _Refused."""
        self._library.call("StopProfiler", self._profiler)
        count = c_int()
        self._library.call("GetNumProfilerEvents", self._profiler, byref(count))
        room = ctypes.create_string_buffer(_ROOM_BYTES * max(1, count.value))
        self._library.call("GetProfilerEvents", self._profiler, count, room)
        events = (_Event * count.value).from_buffer(room)
        if not all(event.kind in _KINDS_OF_EVENTS for event in events):
            raise _Refused("events of another form")
        found = [
            ((event.tag or b"").decode(errors="replace"), event.elapsed_us)
            for event in events
            if event.kind in (_OPERATOR, _KERNEL)
        ]
        # What holds others is timed with all of them: a delegate, a loop, a branch.
        return [(tag, us) for tag, us in found if tag not in _HOLDERS and "Delegate" not in tag]
