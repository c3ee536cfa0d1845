"""Writes a new ONNX graph, node by node; large weights can go straight to a file beside it.

Knows the package onnx and where bytes lie; never what a graph computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekit import _fs
from edgekit.exporters import onnx_graph
from edgekit.exporters.onnx_graph import MICROSOFT

_OPSET, _IR_VERSION = 20, 10
_LEAST_BYTES = 1 << 10  # of a weight that goes to the file beside
_ALIGNMENT = 64


class GraphWriter:
    """One graph on its way to ``path``. Use it in ``with``, and ``finish`` it.

    With ``beside`` the bytes of large constants go to ``<name>.data`` at once, so that they need no
    memory; a protobuf holds 2 GiB at most.
    """

    def __init__(self, path: Path, *, beside: bool = False) -> None:
        self._path = path
        self._graph = onnx.GraphProto(name="model")
        self._known: set[str] = set()
        self._data: BinaryIO | None = None
        if beside:
            with _fs.disk_errors(path):
                self._data = path.with_name(f"{path.name}.data").open("wb")

    def constant(self, name: str, array: Any) -> str:
        """A constant, once for each name; its name."""
        if name in self._known:
            return name
        self._known.add(name)
        array = np.asarray(array, order="C")
        if self._data is None or array.nbytes < _LEAST_BYTES:
            self._graph.initializer.append(numpy_helper.from_array(array, name))
            return name
        with _fs.disk_errors(self._path):
            self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
            place = {"location": f"{self._path.name}.data", "offset": self._data.tell()}
            self._data.write(array.reshape(-1).view(np.uint8).data)
        tensor = self._graph.initializer.add(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (place | {"length": array.nbytes}).items():
            tensor.external_data.add(key=key, value=str(value))
        return name

    def node(
        self, kind: str, inputs: Sequence[str], *outputs: str, own: bool = False, **attributes: Any
    ) -> str:
        """Append a node (``own``: of Microsoft's domain); the name of its first output."""
        self._graph.node.append(
            helper.make_node(
                kind,
                list(inputs),
                list(outputs),
                name=outputs[0],
                domain=MICROSOFT if own else "",
                **attributes,
            )
        )
        return outputs[0]

    def input(self, name: str, dtype: Any, shape: Sequence[int | str]) -> str:
        """A new input; its name."""
        self._graph.input.append(_value(name, dtype, shape))
        return name

    def output(self, name: str, dtype: Any, shape: Sequence[int | str]) -> None:
        """Make a value an output."""
        self._graph.output.append(_value(name, dtype, shape))

    def finish(self) -> None:
        """Write the file."""
        model = helper.make_model(
            self._graph,
            ir_version=_IR_VERSION,
            opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)],
        )
        onnx_graph.save(model, self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._data is not None:
            self._data.close()


def _value(name: str, dtype: Any, shape: Sequence[int | str]) -> Any:
    number = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, number, list(shape))
