"""What llama_model_quantize decides, without quantizing: many dry runs in few processes.

The library is asked through the bindings with dry_run set, and its log is read: one line a tensor with the
type it would get. A bad model can abort the process, so the jobs run in a child; after a crash the rest runs
in a new one and the job that crashed says so.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class DryRun:
    """One job. Types are ggml ids; `scalars` are further fields of llama_model_quantize_params."""

    model: str
    ftype: int
    imatrix: bool = False
    overrides: Sequence[tuple[str, int]] = ()
    scalars: dict[str, Any] = field(default_factory=dict)
    prune: Sequence[int] = ()


@dataclass(frozen=True)
class Outcome:
    """The types in the library's order, by its lower-case names (`types` holds (name, source, target)).

    `error` is the library's message, or says that it aborted; then `types` is empty. `fallbacks` is the
    number of tensors that it reports as needing fallback quantization.
    """

    types: list[tuple[str, str, str]]
    fallbacks: int = 0
    needs_imatrix: bool = False
    error: str = ""


def dry_runs(jobs: Sequence[DryRun]) -> list[Outcome]:
    """The outcome of every job, in order."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(jobs):
        rest = [asdict(job) for job in jobs[len(outcomes) :]]
        done = subprocess.run(
            [sys.executable, __file__], input=json.dumps(rest), capture_output=True, text=True, check=False
        )
        for line in filter(lambda line: line.startswith("{"), done.stdout.splitlines()):
            answer = json.loads(line)
            answer["types"] = [tuple(row) for row in answer["types"]]
            outcomes.append(Outcome(**answer))
        if len(outcomes) < len(jobs):
            last = [line for line in done.stderr.splitlines() if "ASSERT" in line or "fatal" in line]
            outcomes.append(Outcome([], error=f"aborted ({done.returncode}): {' '.join(last)[-300:]}"))
    return outcomes


_TENSOR = re.compile(
    r"\[ *\d+/ *\d+\] (?P<name>.*?) +- \[[ \d,]*\], type = +(?P<source>\w+), "
    r"size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((?P<target>\w+)\))?\n",
    re.DOTALL,
)
_FALLBACKS = re.compile(r"WARNING: (\d+) of \d+ tensor\(s\) required fallback")


def _read(log: str, status: int) -> dict[str, Any]:
    if status:
        failed = [line for line in log.splitlines() if "failed" in line or "error" in line.lower()]
        return {"types": [], "error": (failed or [log[-300:] or "no reason given"])[-1]}
    rows = [(row["name"], row["source"], row["target"] or row["source"]) for row in _TENSOR.finditer(log)]
    fallbacks = _FALLBACKS.search(log)
    return {
        "types": rows,
        "fallbacks": int(fallbacks[1]) if fallbacks else 0,
        "needs_imatrix": "will require an imatrix" in log,
    }


def _serve(jobs: list[dict[str, Any]]) -> None:
    from llama_cpp import llama_cpp as lib

    lines: list[bytes] = []

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def log(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        lines.append(text)

    lib.llama_log_set(log, ctypes.c_void_p(0))
    one = (ctypes.c_float * 1)(1.0)
    entries = (lib.llama_model_imatrix_data * 2)()
    entries[0].name, entries[0].size = b"some.weight", 1
    entries[0].data = ctypes.cast(one, ctypes.POINTER(ctypes.c_float))
    for job in jobs:
        lines.clear()
        params = lib.llama_model_quantize_default_params()
        params.ftype, params.dry_run, params.nthread = job["ftype"], True, 1
        for key, value in job["scalars"].items():
            setattr(params, key, value)
        overrides = (lib.llama_model_tensor_override * (len(job["overrides"]) + 1))()
        for row, (pattern, kind) in zip(overrides, job["overrides"], strict=False):
            row.pattern, row.type = pattern.encode("utf-8", "surrogateescape"), kind
        prune = (ctypes.c_int32 * (len(job["prune"]) + 1))(*job["prune"], -1)
        if job["imatrix"]:
            params.imatrix = _pointer(entries)
        if job["overrides"]:
            params.tt_overrides = _pointer(overrides)
        if job["prune"]:
            params.prune_layers = _pointer(prune)
        status = lib.llama_model_quantize(job["model"].encode(), b"unused", ctypes.byref(params))
        text = b"".join(lines).decode("utf-8", "surrogateescape")
        print(json.dumps(_read(text, status)), flush=True)


def _pointer(array: Any) -> Any:
    return ctypes.cast(array, ctypes.POINTER(array._type_))


if __name__ == "__main__":
    # the structures above must outlive each call; _serve keeps them in its frame
    _serve(json.load(sys.stdin))
