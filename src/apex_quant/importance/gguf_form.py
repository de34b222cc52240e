"""Importance matrices as GGUF files: general.type = imatrix, `<tensor>.in_sum2` and `<tensor>.counts`.

The form of llama-imatrix (tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp). Stock's loader skips tensors of
another kind without a word: those with `.apex_` in their names are our extra data, others are kept in
`Importance.ignored` by name. Where it would read on with wrong numbers (sums that are no multiple of the counts,
negative counts) reading stops.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from apex_quant.errors import InputError
from apex_quant.gguf.header import TensorInfo
from apex_quant.gguf.reader import GGUFModel, open_model
from apex_quant.gguf.types import TYPES
from apex_quant.gguf.values import Value, ValueType
from apex_quant.gguf.writer import TensorSpec, layout
from apex_quant.importance.hashed import hashed_file
from apex_quant.importance.imatrix import F32, Entry, Extra, Importance

DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
EXTRA = ".apex_"
MAX_ROWS = 1 << 16  # experts of one tensor; far above any model
MAX_COUNT = 1 << 53  # tokens behind one row
MAX_TENSOR_NAME = 63  # ggml cuts longer ones
MAX_NAME = MAX_TENSOR_NAME - len(SUMS)


def read(path: Path) -> Importance:
    """Read the container and the counts; sums are left to be read. Raises InputError or GGUFError."""
    with ExitStack() as files:
        model = files.enter_context(open_model(path))
        if len(model.files) > 1:
            raise InputError(f"{path}: an importance matrix in several shards cannot be read")
        kind = _string(model, "general.type")
        if kind is not None and kind != "imatrix":
            raise InputError(f"{path}: a GGUF file of type {kind!r}, not an importance matrix")
        pairs: dict[str, dict[str, TensorInfo]] = {}
        extras: dict[str, Extra] = {}
        ignored = []
        for info in model.tensors.values():
            suffix = next((s for s in (SUMS, COUNTS) if info.name.endswith(s) and info.name != s), None)
            if suffix is None and EXTRA in info.name and info.type.name == "F32" and info.n_elements:
                extras[info.name] = Extra(info.shape[::-1], _values(model, info))
            elif suffix is None:
                ignored.append(info.name)
            else:
                pairs.setdefault(info.name.removesuffix(suffix), {})[suffix] = info
        if not pairs:
            raise InputError(f"{path}: holds no importance entries", hint="is it a model file?")
        missing = [key for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE) if key not in model.metadata]
        if missing:
            raise InputError(f"{path}: the importance matrix lacks the key {', '.join(missing)}")
        entries: dict[str, Entry] = {}
        for name in sorted(pairs, key=_bytes):
            entries[name] = _entry(model, path, name, pairs[name])
        return Importance(
            entries,
            datasets=_datasets(model, path),
            chunk_count=_count(model, path, CHUNK_COUNT),
            chunk_size=_count(model, path, CHUNK_SIZE),
            metadata={
                key: value
                for key, value in model.metadata.items()
                if key not in ("general.type", DATASETS, CHUNK_COUNT, CHUNK_SIZE)
            },
            extras={name: extras[name] for name in sorted(extras, key=_bytes)},
            ignored=tuple(ignored),
            _files=files.pop_all(),
        )


def write(importance: Importance, path: Path) -> str:
    """Write `importance` atomically; returns the sha256 of the file."""
    if not importance.entries:
        raise InputError("an importance matrix without entries cannot be written")
    names = sorted(importance.entries, key=_bytes)
    too_long = next((name for name in names if len(_bytes(name)) > MAX_NAME), None)
    if too_long is not None:
        raise InputError(f"{too_long}: name longer than the {MAX_NAME} bytes that llama.cpp can read")
    extras = sorted(importance.extras, key=_bytes)
    wrong = next((name for name in extras if EXTRA not in name or len(_bytes(name)) > MAX_TENSOR_NAME), None)
    if wrong is not None:
        raise InputError(f"{wrong}: extra tensors have {EXTRA} in their names and at most {MAX_TENSOR_NAME} bytes")
    metadata = {
        "general.type": Value.string("imatrix"),
        DATASETS: Value.array(ValueType.STRING, tuple(importance.datasets)),
        CHUNK_COUNT: Value.u32(importance.chunk_count),
        CHUNK_SIZE: Value.u32(importance.chunk_size),
        **importance.metadata,
    }
    specs, f32 = [], TYPES["F32"]
    for name in names:
        entry = importance.entries[name]
        specs += [
            TensorSpec(name + SUMS, (entry.n_in, entry.n_mat), f32),
            TensorSpec(name + COUNTS, (1, entry.n_mat), f32),
        ]
    specs += [TensorSpec(name, importance.extras[name].shape[::-1], f32) for name in extras]
    plan = layout(metadata, specs)
    with hashed_file(path) as file:
        file.put(plan.header)
        for name in names:
            entry = importance.entries[name]
            file.put(entry.sums.astype("<f4").tobytes(), plan.offsets[name + SUMS])
            file.put(entry.counts.astype("<f4").tobytes(), plan.offsets[name + COUNTS])
        for name in extras:
            file.put(importance.extras[name].values.astype("<f4").tobytes(), plan.offsets[name])
        file.put(b"", plan.total_bytes)
    return file.sha256


def _entry(model: GGUFModel, path: Path, name: str, pair: dict[str, TensorInfo]) -> Entry:
    if len(pair) != 2:
        lacking = SUMS if COUNTS in pair else COUNTS
        raise InputError(f"{path}: {name}: {name}{lacking} is missing")
    for info in pair.values():
        if info.type.name != "F32":
            raise InputError(f"{path}: {name}: {info.name} is {info.type.name}, must be F32")
    sums, counts = pair[SUMS], pair[COUNTS]
    n_mat, size = counts.n_elements, sums.n_elements
    if not 0 < n_mat <= MAX_ROWS or size == 0 or size % n_mat:
        raise InputError(f"{path}: {name}: {size} sums do not divide into {n_mat} rows (at most {MAX_ROWS})")
    raw = np.frombuffer(model.read(counts), dtype="<f4").astype(np.float64)
    if not (np.isfinite(raw) & (raw >= 0) & (raw <= MAX_COUNT)).all():
        raise InputError(f"{path}: {name}: a count is not a finite non-negative number of tokens")
    # lround of a non-negative float32: the sum is exact in double
    return Entry(np.floor(raw + 0.5).astype(np.int64), size // n_mat, _values(model, sums))


def _values(model: GGUFModel, info: TensorInfo) -> Callable[[int, int], F32]:
    def read(start: int, n: int) -> F32:
        return np.frombuffer(model.read(info, start * 4, n * 4), dtype="<f4").astype(np.float32, copy=False)

    return read


def _string(model: GGUFModel, key: str) -> str | None:
    value = model.metadata.get(key)
    return value.data if value is not None and isinstance(value.data, str) else None


def _datasets(model: GGUFModel, path: Path) -> tuple[str, ...]:
    value = model.metadata[DATASETS]
    if isinstance(value.data, tuple):
        return value.data
    if value.type is ValueType.ARRAY and value.count == 0:
        return ()
    raise InputError(f"{path}: {DATASETS} is not a list of strings")


def _count(model: GGUFModel, path: Path, key: str) -> int:
    value = model.metadata[key]
    if value.type is not ValueType.UINT32 or not isinstance(value.data, int):
        raise InputError(f"{path}: {key} is not an unsigned 32-bit number")
    return value.data


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
