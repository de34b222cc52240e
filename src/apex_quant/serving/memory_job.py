"""In a child process: what the library would allocate for a model and its contexts, without allocating it.

llama.cpp loads a model with `no_alloc` from its header alone and then says, for each context, what its memory and its
computations would take; its own `common_fit_params` asks in the same way. Recurrent states are really allocated.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from typing import Any, Final

from apex_quant.errors import InputError, ResourceError
from apex_quant.evaluation.kv_types import cache_size
from apex_quant.gguf.types import TYPES
from apex_quant.native import ggml
from apex_quant.native.bindings import bindings
from apex_quant.native.worker import Emit, Json, Stopped
from apex_quant.runtime.buffers import override_table

_FLASH_ATTENTION: Final = {"auto": -1, "off": 0, "on": 1}  # LLAMA_FLASH_ATTN_TYPE_...
_COMPUTE: Final = re.compile(r"(\S+) compute buffer size = +([\d.]+) MiB")
_OUTPUT: Final = re.compile(r"(\S+) +output buffer size = +([\d.]+) MiB")


def measure(payload: Json, emit: Emit, stop: threading.Event, fds: list[int]) -> Json:
    """`payload`: path, model (gpu_layers, overrides) and contexts; the answer has one entry for each context."""
    ggml()  # says what is wrong with the installation, if anything is
    lib = bindings()
    lines: list[str] = []

    def take(level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace")
        os.write(2, text)
        if level == 5 and lines:  # GGML_LOG_LEVEL_CONT
            lines[-1] += line
        else:
            lines.append(line)

    callback = lib.llama_log_callback(take)
    lib.llama_log_set(callback, None)
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = lib.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = payload.get("gpu_layers", 0)
    overrides = [(str(a), str(b)) for a, b in payload.get("overrides", [])]
    table = override_table(overrides) if overrides else None
    if table is not None:
        params.tensor_buft_overrides = ctypes.cast(table, ctypes.c_void_p)
    model = lib.llama_model_load_from_file(os.fsencode(payload["path"]), params)
    if not model:
        raise InputError(f"{payload['path']}: llama.cpp cannot load this model: {_last(lines)}")
    answers = []
    for wanted in payload["contexts"]:
        if stop.is_set():
            raise Stopped
        lines.clear()
        answers.append(_context(lib, model, wanted, lines))
        emit({"event": "progress", "done": len(answers), "total": len(payload["contexts"])})
    lib.llama_model_free(model)
    return {"contexts": answers}


def _context(lib: Any, model: Any, wanted: Json, lines: list[str]) -> Json:
    params = lib.llama_context_default_params()
    params.n_ctx = wanted["ctx"] * wanted.get("sequences", 1)
    params.n_seq_max = wanted.get("sequences", 1)
    params.n_batch = max(wanted.get("batch", 2048), wanted.get("ubatch", 512))
    params.n_ubatch = wanted.get("ubatch", 512)
    params.type_k = TYPES[wanted.get("type_k", "f16").upper()].id
    params.type_v = TYPES[wanted.get("type_v", "f16").upper()].id
    params.flash_attn_type = _FLASH_ATTENTION[wanted.get("flash_attention", "auto")]
    params.kv_unified = wanted.get("unified", False)
    params.swa_full = wanted.get("swa_full", False)
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise ResourceError(f"no context of {wanted}: {_last(lines)}")
    lib.llama_free(context)
    text = "\n".join(lines)
    return {
        "compute": {name: float(size) for name, size in _COMPUTE.findall(text)},
        "output": {name: float(size) for name, size in _OUTPUT.findall(text)},
        "memory": [size._asdict() for size in map(cache_size, lines) if size],
    }


def _last(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip(" .\n")), "nothing was said")
