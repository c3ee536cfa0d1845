"""How a tensor of the running engine looks from Python: its head in memory, and operators' names.

Exporters and runtimes read live tensors with it; it knows neither, and no model. Must never be used
outside the process that holds the engine.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from edgekit.llama_library import ggml_library

TYPE_F32 = 0


class Tensor(ctypes.Structure):
    """The head of ggml_tensor (ggml.h), as far as names, shapes and data are needed."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )

    @classmethod
    def at(cls, pointer: Any) -> Tensor:
        """The tensor that lies at ``pointer``; valid as long as the engine keeps it."""
        return ctypes.cast(pointer, ctypes.POINTER(cls)).contents

    def source(self, index: int) -> Tensor:
        """Operand ``index`` of the operator that makes this tensor."""
        return Tensor.at(self.src[index])


@functools.cache
def op_name(op: int) -> str:
    """``"MUL_MAT"`` and the like, asked from the library: the enum moves between versions."""
    ask = ggml_library().ggml_op_name
    ask.argtypes = [ctypes.c_int]
    ask.restype = ctypes.c_char_p
    name: bytes = ask(op)
    return name.decode()
