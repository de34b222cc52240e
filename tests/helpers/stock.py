"""llama_model_quantize through the bindings, in a process of its own: the oracle for files and for time.

Run as a script it takes a job as JSON on standard input and prints the outcome as JSON. Importance matrices
are read here by PyPI gguf and weighted by the formula of llama-quantize's load_imatrix, apart from the code
that is tested against it.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plain() -> list[str]:
    """What llama.cpp's tools, linked with the installed library, need on this machine (docs/decisions/0007-amx.md)."""
    from apex_quant.native.library import compiled_with_amx  # not above: as a script this file is timed

    return ["--no-repack"] if compiled_with_amx() else []


class StockError(Exception):
    """llama_model_quantize refused or died; the message holds its log."""


def stock_quantize(
    model: Path,
    out: Path,
    ftype: int,
    *,
    imatrix: Path | None = None,
    tensor_types: Sequence[tuple[str, int]] = (),
    threads: int = 1,
    **params: Any,
) -> dict[str, Any]:
    """Quantize `model` with llama.cpp itself in a new process; returns {"quantize_s", "imatrix_s", "process_s", "log"}.

    `tensor_types` are (regex, ggml type id) overrides; `params` any other scalar of
    llama_model_quantize_params, or prune_layers=[...]. The two first times are taken inside the process.
    """
    job = stock_job(model, out, ftype, imatrix=imatrix, tensor_types=tensor_types, threads=threads, **params)
    start = time.perf_counter()
    (result,) = stock_quantize_all([job])
    return {**result, "process_s": time.perf_counter() - start}


def stock_job(
    model: Path,
    out: Path,
    ftype: int,
    *,
    imatrix: Path | None = None,
    tensor_types: Sequence[tuple[str, int]] = (),
    threads: int = 1,
    **params: Any,
) -> dict[str, Any]:
    """The arguments of `stock_quantize` for `stock_quantize_all`."""
    return {
        "model": str(model),
        "out": str(out),
        "imatrix": str(imatrix) if imatrix else None,
        "tensor_types": list(tensor_types),
        "params": {"ftype": ftype, "nthread": threads, **params},
    }


def stock_quantize_all(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several jobs in one process, which builds the IQ tables once: 7 s less for each further file with IQ1 types."""
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise StockError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    for result in results:
        if result.pop("status") != 0:
            raise StockError(result["log"])
    return results


def imatrix_weights(path: Path) -> dict[str, Any]:
    """{name: float32 array, flat} as llama-quantize's load_imatrix makes them, for both file forms."""
    import struct

    import numpy as np

    data = path.read_bytes()
    weights: dict[str, Any] = {}
    if data[:4] == b"GGUF":
        from gguf import GGUFReader

        tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
        for key, sums in tensors.items():
            if not key.endswith(".in_sum2"):
                continue
            name = key.removesuffix(".in_sum2")
            counts = tensors[name + ".counts"].reshape(-1)
            rows = np.array(sums, dtype=np.float32).reshape(len(counts), -1)
            for row, count in zip(rows, counts, strict=True):
                n = np.float32(int(float(count) + 0.5))
                row[:] = row / n if n > 0 else 1
            weights[name] = rows.reshape(-1)
        return weights
    (n_entries,) = struct.unpack_from("<i", data)
    at = 4
    for _ in range(n_entries):
        (length,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        ncall, nval = struct.unpack_from("<ii", data, at + 4 + length)
        values = np.frombuffer(data, "<f4", nval, at + 12 + length)
        weights[name] = values / np.float32(ncall) if ncall > 0 else values.copy()
        at += 12 + length + 4 * nval
    return weights


def _run(job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from llama_cpp import llama_cpp as lib

    lines: list[str] = []

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    lib.llama_log_set(log, ctypes.c_void_p(0))
    lib.llama_backend_init()
    params = lib.llama_model_quantize_default_params()
    scalars = dict(job["params"])
    keep: list[Any] = []  # what the structures point to
    prune = scalars.pop("prune_layers", None)
    if prune:
        params.prune_layers = keep_array(keep, (ctypes.c_int32 * (len(prune) + 1))(*prune, -1))
    for key, value in scalars.items():
        setattr(params, key, value)
    start = time.perf_counter()
    if job["imatrix"]:
        weights = imatrix_weights(Path(job["imatrix"]))
        rows = (lib.llama_model_imatrix_data * (len(weights) + 1))()
        for row, (name, values) in zip(rows, weights.items(), strict=False):
            array = np.ascontiguousarray(values, dtype=np.float32)
            keep.append(array)
            row.name, row.size = name.encode(), array.size
            row.data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = keep_array(keep, rows)
    imatrix_s = time.perf_counter() - start
    if job["tensor_types"]:
        overrides = (lib.llama_model_tensor_override * (len(job["tensor_types"]) + 1))()
        for override, (pattern, kind) in zip(overrides, job["tensor_types"], strict=False):
            override.pattern, override.type = pattern.encode(), kind
        params.tt_overrides = keep_array(keep, overrides)
    start = time.perf_counter()
    status = lib.llama_model_quantize(job["model"].encode(), job["out"].encode(), ctypes.byref(params))
    quantize_s = time.perf_counter() - start
    return {"status": status, "quantize_s": quantize_s, "imatrix_s": imatrix_s, "log": "".join(lines)}


def keep_array(keep: list[Any], array: Any) -> Any:
    """The array as the pointer that a parameter structure takes, kept alive by `keep`."""
    keep.append(array)
    return ctypes.cast(array, ctypes.POINTER(array._type_))


if __name__ == "__main__":
    outcomes = [_run(job) for job in json.load(sys.stdin)]
    print()
    print(json.dumps(outcomes))
