"""What llama.cpp's own container code says about a file, through ctypes: the oracle of the reader and writer."""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


class _Params(ctypes.Structure):
    _fields_ = (("no_alloc", c_bool), ("ctx", POINTER(c_void_p)))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "gguf_init_from_file": (c_void_p, (c_char_p, _Params)),
    "gguf_free": (None, (c_void_p,)),
    "gguf_get_alignment": (c_size_t, (c_void_p,)),
    "gguf_get_data_offset": (c_size_t, (c_void_p,)),
    "gguf_get_n_kv": (c_int64, (c_void_p,)),
    "gguf_get_key": (c_char_p, (c_void_p, c_int64)),
    "gguf_get_kv_type": (c_int, (c_void_p, c_int64)),
    "gguf_get_arr_type": (c_int, (c_void_p, c_int64)),
    "gguf_get_arr_n": (c_size_t, (c_void_p, c_int64)),
    "gguf_get_n_tensors": (c_int64, (c_void_p,)),
    "gguf_get_tensor_name": (c_char_p, (c_void_p, c_int64)),
    "gguf_get_tensor_offset": (c_size_t, (c_void_p, c_int64)),
    "gguf_get_tensor_type": (c_int, (c_void_p, c_int64)),
    "gguf_get_tensor_size": (c_size_t, (c_void_p, c_int64)),
    "gguf_write_to_file": (c_bool, (c_void_p, c_char_p, c_bool)),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_type_size": (c_size_t, (c_int,)),
    "ggml_type_name": (c_char_p, (c_int,)),
    "ggml_is_quantized": (c_bool, (c_int,)),
    "ggml_quantize_requires_imatrix": (c_bool, (c_int,)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
}
ARRAY = 9


@cache
def ggml() -> Any:
    """libggml-base of the installed llama-cpp-python, without importing the bindings."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    found = sorted(folder.glob("libggml-base.*"))
    library = ctypes.CDLL(str(found[0]))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@dataclass(frozen=True)
class Parsed:
    """A file as ggml reads it: keys with (type, element type, count), tensors with (offset, type, bytes)."""

    alignment: int
    data_start: int
    keys: dict[str, tuple[int, int | None, int]]
    tensors: dict[str, tuple[int, int, int]]


def parse(path: Path, rewrite: Path | None = None) -> Parsed | None:
    """gguf_init_from_file; None when it refuses. With `rewrite`, gguf_write_to_file (header only) there."""
    lib = ggml()
    context = lib.gguf_init_from_file(str(path).encode(), _Params(True, None))
    if not context:
        return None
    try:
        keys: dict[str, tuple[int, int | None, int]] = {}
        for i in range(lib.gguf_get_n_kv(context)):
            kind = lib.gguf_get_kv_type(context, i)
            is_array = kind == ARRAY
            keys[lib.gguf_get_key(context, i).decode()] = (
                kind,
                lib.gguf_get_arr_type(context, i) if is_array else None,
                lib.gguf_get_arr_n(context, i) if is_array else 1,
            )
        start = lib.gguf_get_data_offset(context)
        tensors = {
            lib.gguf_get_tensor_name(context, i).decode(): (
                start + lib.gguf_get_tensor_offset(context, i),
                lib.gguf_get_tensor_type(context, i),
                lib.gguf_get_tensor_size(context, i),
            )
            for i in range(lib.gguf_get_n_tensors(context))
        }
        if rewrite is not None:
            assert lib.gguf_write_to_file(context, str(rewrite).encode(), True)
        return Parsed(lib.gguf_get_alignment(context), start, keys, tensors)
    finally:
        lib.gguf_free(context)
