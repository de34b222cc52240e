"""Reading tensors of a running graph: struct ggml_tensor by ctypes, data on any backend as NumPy arrays.

The layout is that of ggml.h in the pinned library and is checked before its first use: a field that moved would
otherwise be read as a wild pointer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import ResourceError
from apex_quant.native import ggml

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

TYPE_F32, TYPE_I32 = 0, 26
_OBJECT_BYTES = 32  # struct ggml_object, which ggml_tensor_overhead() counts too


class CTensor(ctypes.Structure):
    """struct ggml_tensor."""

    _fields_ = [
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
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


OP_OFFSET = CTensor.op.offset
SRC_OFFSET = CTensor.src.offset
NAME_OFFSET = CTensor.name.offset


class Tensors:
    """Access to the tensors that an eval callback is shown, by address."""

    def __init__(self) -> None:
        lib = ctypes.CDLL(str(ggml().path))

        def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
            found = getattr(lib, name)
            found.restype, found.argtypes = result, list(arguments)
            return found  # type: ignore[no-any-return]

        address = ctypes.c_void_p
        self._nbytes = function("ggml_nbytes", ctypes.c_size_t, address)
        self._get = function("ggml_backend_tensor_get", None, address, address, ctypes.c_size_t, ctypes.c_size_t)
        self._is_host = function("ggml_backend_buffer_is_host", ctypes.c_bool, address)
        self._get_name = function("ggml_get_name", address, address)
        op_name = function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
        overhead = function("ggml_tensor_overhead", ctypes.c_size_t)()
        if overhead != _OBJECT_BYTES + ctypes.sizeof(CTensor):
            raise ResourceError(f"the installed ggml has tensors of {overhead} bytes, not of the layout known here")
        self._checked = False
        self.ops = {op_name(number).decode(): number for number in range(80)}
        for wanted in ("MUL_MAT", "MUL_MAT_ID", "ARGSORT"):
            if wanted not in self.ops:
                raise ResourceError(f"the installed ggml does not know the operation {wanted}")

    def at(self, address: int) -> CTensor:
        """The tensor at an address. Valid until the callback returns."""
        if not self._checked:
            if self._get_name(address) != address + NAME_OFFSET:
                raise ResourceError("the installed ggml lays its tensors out in another way than is known here")
            self._checked = True
        return CTensor.from_address(address)

    @staticmethod
    def name(address: int) -> str:
        return weight_name(ctypes.string_at(address + NAME_OFFSET))

    def floats(self, address: int) -> F32:
        """Its float32 data in NumPy order (ne reversed), strided as it lies; a copy where it is on a device."""
        return cast(F32, self._array(address, np.float32, TYPE_F32))

    def ints(self, address: int) -> I32:
        """The same for int32."""
        return cast(I32, self._array(address, np.int32, TYPE_I32))

    def _array(self, address: int, kind: type, wanted: int) -> Any:
        tensor = self.at(address)
        if tensor.type != wanted:
            raise ResourceError(f"{self.name(address)}: data of type {tensor.type} where {wanted} was expected")
        size = self._nbytes(address)
        if tensor.buffer and not self._is_host(tensor.buffer):
            buffer: Any = np.empty(size, np.uint8)
            self._get(address, buffer.ctypes.data, 0, size)
        else:
            buffer = (ctypes.c_char * size).from_address(tensor.data)
        return np.ndarray(tuple(tensor.ne)[::-1], kind, buffer, 0, tuple(tensor.nb)[::-1])


def weight_name(raw: bytes) -> str:
    """A tensor's name without the marks that copies between backends get: CUDA0#blk.0.attn_k.weight#0."""
    text = raw.decode("utf-8", "replace")
    return text.split("#")[1] if "#" in text else text
