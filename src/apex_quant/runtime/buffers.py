"""Which device's memory holds which weights: the library's table of overrides, and its buffer types by name."""

from __future__ import annotations

import ctypes

from apex_quant.errors import UsageError
from apex_quant.native import ggml


class Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]


def override_table(overrides: list[tuple[str, str]]) -> ctypes.Array[Override]:
    """The library's table for (pattern, buffer name), ended by an empty row. Raises UsageError."""
    rows = (Override * (len(overrides) + 1))()
    for row, (pattern, buffer) in zip(rows, overrides, strict=False):
        row.pattern, row.buffer_type = pattern.encode(), _buffer_type(buffer)
    return rows


def _buffer_type(name: str) -> int:
    """The default buffer type of the device called `name` (CPU, CUDA0, ...). Raises UsageError."""
    base = ctypes.CDLL(str(ggml().path))
    if name == "CPU":
        base.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
        return int(base.ggml_backend_cpu_buffer_type())
    path = ggml().path
    registry = ctypes.CDLL(str(path.with_name(path.name.replace("ggml-base", "ggml"))))
    registry.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    registry.ggml_backend_dev_by_name.argtypes = [ctypes.c_char_p]
    device = registry.ggml_backend_dev_by_name(name.encode())
    if not device:
        raise UsageError(f"the library has no device {name!r}", hint="`apex doctor` lists its backends")
    base.ggml_backend_dev_buffer_type.restype = ctypes.c_void_p
    base.ggml_backend_dev_buffer_type.argtypes = [ctypes.c_void_p]
    return int(base.ggml_backend_dev_buffer_type(device))
