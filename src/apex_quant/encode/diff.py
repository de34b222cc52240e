"""`diff`: what differs between two GGUF files of the same model: types, bytes, metadata, and values on request."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apex_quant.encode.job import JobProgress
from apex_quant.errors import InputError
from apex_quant.gguf import GGUFModel, TensorInfo, open_model
from apex_quant.model.facts import NOT_MODELS
from apex_quant.model.stats import weight_chunks

_BLOCK = 8 << 20


@dataclass(frozen=True)
class TensorDifference:
    """One tensor that is not the same in both files. `error` is the relative RMS distance of b's values from a's."""

    name: str
    type_a: str | None
    type_b: str | None
    bytes_a: int
    bytes_b: int
    same_shape: bool
    same_data: bool | None
    error: float | None


@dataclass(frozen=True)
class Difference:
    """All that differs; empty lists mean equal. `data` is None where only headers were compared."""

    a: str
    b: str
    bytes_a: int
    bytes_b: int
    metadata: tuple[tuple[str, str | None, str | None], ...]
    tensors: tuple[TensorDifference, ...]
    tensors_equal: int

    def to_json(self) -> dict[str, Any]:
        return {
            "a": self.a,
            "b": self.b,
            "bytes_a": self.bytes_a,
            "bytes_b": self.bytes_b,
            "metadata": [{"key": key, "a": a, "b": b} for key, a, b in self.metadata],
            "tensors": [
                {name: getattr(t, name) for name in TensorDifference.__dataclass_fields__} for t in self.tensors
            ],
            "tensors_equal": self.tensors_equal,
        }


def diff(
    a: str | Path,
    b: str | Path,
    *,
    headers_only: bool = False,
    values: bool = False,
    progress: Callable[[JobProgress], None] | None = None,
) -> Difference:
    """Compare two files (or sets of shards) tensor by tensor.

    Equal types are compared byte by byte unless `headers_only`; `values` also dequantizes what differs and gives
    the relative error sqrt(sum((b-a)^2) / sum(a^2)). Raises GGUFError for files that cannot be read, InputError for
    files of which one is a model and one is not.
    """
    with open_model(a) as one, open_model(b) as two:
        _require_alike(one, two)
        names = list(dict.fromkeys([*one.tensors, *two.tensors]))
        total = sum(info.nbytes for info in one.tensors.values())
        tensors, equal, done = [], 0, 0
        for name in names:
            row = _tensor(one, two, name, headers_only, values)
            if row is None:
                equal += 1
            else:
                tensors.append(row)
            done += one.tensors[name].nbytes if name in one.tensors else 0
            if progress is not None:
                progress(JobProgress("compare", done, total, done, total, name))
        return Difference(
            a=str(a),
            b=str(b),
            bytes_a=sum(file.size for file in one.files),
            bytes_b=sum(file.size for file in two.files),
            metadata=tuple(_metadata(one, two)),
            tensors=tuple(tensors),
            tensors_equal=equal,
        )


def _require_alike(one: GGUFModel, two: GGUFModel) -> None:
    """A model and an importance matrix or an adapter have no tensors in common: a list of all of them says nothing."""
    kinds = [(model, str(model.get("general.type") or "model")) for model in (one, two)]
    others = [(model, kind) for model, kind in kinds if kind in NOT_MODELS]
    if others and kinds[0][1] != kinds[1][1]:
        model, kind = others[0]
        hint = "apex imatrix diff compares two of them" if kind == "imatrix" else None
        raise InputError(f"{model.path}: a GGUF file of type {kind!r}, not a model as the other", hint=hint)


def _metadata(one: GGUFModel, two: GGUFModel) -> list[tuple[str, str | None, str | None]]:
    rows = []
    for key in dict.fromkeys([*one.metadata, *two.metadata]):
        a, b = one.metadata.get(key), two.metadata.get(key)
        if a is None or b is None or (a.type, a.element, bytes(a.raw)) != (b.type, b.element, bytes(b.raw)):
            rows.append((key, None if a is None else _short(str(a)), None if b is None else _short(str(b))))
    return rows


def _short(text: str) -> str:
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # JSON has no place for raw bytes
    return text if len(text) <= 100 else text[:97] + "..."


def _tensor(one: GGUFModel, two: GGUFModel, name: str, headers_only: bool, values: bool) -> TensorDifference | None:
    a, b = one.tensors.get(name), two.tensors.get(name)
    same_shape = a is not None and b is not None and a.shape == b.shape
    same_data: bool | None = None
    if a is not None and b is not None and same_shape and a.type is b.type:
        if headers_only:
            return None
        same_data = _digest(one, a) == _digest(two, b)
        if same_data:
            return None
    error = None
    if values and a is not None and b is not None and same_shape:
        error = relative_error(one, a, two, b)
    return TensorDifference(
        name=name,
        type_a=a.type.name if a else None,
        type_b=b.type.name if b else None,
        bytes_a=a.nbytes if a else 0,
        bytes_b=b.nbytes if b else 0,
        same_shape=same_shape,
        same_data=same_data,
        error=error,
    )


def _digest(model: GGUFModel, info: TensorInfo) -> bytes:
    digest = hashlib.sha256()
    for start in range(0, info.nbytes, _BLOCK):
        digest.update(model.read(info, start, min(_BLOCK, info.nbytes - start)))
    return digest.digest()


def relative_error(one: GGUFModel, a: TensorInfo, two: GGUFModel, b: TensorInfo) -> float | None:
    """sqrt(sum((b-a)^2) / sum(a^2)) over a tensor of equal shape; None for integers or unknown types."""
    distance = norm = 0.0
    try:
        for left, right in zip(weight_chunks(one, a), weight_chunks(two, b), strict=True):
            x, y = np.asarray(left, np.float64).ravel(), np.asarray(right, np.float64).ravel()
            distance += float(np.dot(y - x, y - x))
            norm += float(np.dot(x, x))
    except NotImplementedError:
        return None
    return math.sqrt(distance / norm) if norm > 0 else (0.0 if distance == 0 else math.inf)
