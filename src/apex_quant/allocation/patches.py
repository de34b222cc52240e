"""Weights as a type would leave them: real rows encoded and decoded again, or random noise of the same size.

Rows are read from the source model, encoded with the tensor's importance by ggml's own encoder, decoded by ggml, and
stored in the type in which the tensor is loaded. Peak memory is a few times _WEIGHTS floats for each thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.encode.encoder import Decoder, GgmlEncoder
from apex_quant.errors import InputError
from apex_quant.gguf import GGMLType, GGUFModel, ggml_type
from apex_quant.gguf.header import TensorInfo
from apex_quant.importance import Importance

F32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

RANK = 32
_WEIGHTS = 1 << 18  # worked on together by one thread


@dataclass
class Sums:
    """Squared errors and squares, plain and weighted: what relative errors are made of."""

    error: float = 0.0
    square: float = 0.0
    weighted_error: float = 0.0
    weighted_square: float = 0.0

    def add(self, before: F32, after: F32, weights: F32 | None) -> None:
        """`before`, `after` [rows, n]; `weights` [n], None for ones."""
        squares = np.square(before, dtype=np.float64).sum(axis=0)
        errors = np.square(before.astype(np.float64) - after).sum(axis=0)
        self.error += float(errors.sum())
        self.square += float(squares.sum())
        self.weighted_error += float((errors if weights is None else errors * weights).sum())
        self.weighted_square += float((squares if weights is None else squares * weights).sum())

    def __iadd__(self, other: Sums) -> Sums:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def relative(self) -> float:
        return self.error / self.square if self.square > 0 else 0.0

    @property
    def weighted(self) -> float:
        """Relative weighted error; without any weight the plain one."""
        return self.weighted_error / self.weighted_square if self.weighted_square > 0 else self.relative


class Weights:
    """Rows of a tensor with their importance: `encoding` [slices, n] is what the encoder gets (means, ones where an
    expert saw nothing), `counting` [slices, n] what errors are weighted by (sums over all tokens: an expert that is
    used more often counts for more). Both None without importance. Made anew for each use: importance of all experts
    of a large model takes gigabytes."""

    def __init__(self, model: GGUFModel, info: TensorInfo, importance: Importance | None) -> None:
        self.model, self.info = model, info
        self.n = info.shape[0]
        self.rows = info.n_elements // self.n
        self.rows_per_slice = info.shape[1] if len(info.shape) > 1 else 1
        self.encoding: F32 | None = None
        self.counting: F32 | None = None
        if importance is not None:
            self.encoding = importance.for_tensor(info)
        if importance is not None and self.encoding is not None:
            entry = importance.entries[str(importance.find(info.name))]
            sums = entry.sums.reshape(-1, self.n)
            self.counting = sums if sums.any() else None

    def read(self, first: int, count: int) -> F32:
        """Rows [count, n] from row `first` on. Raises InputError for a value that is not finite."""
        row_bytes = self.info.type.row_bytes(self.n)
        raw = np.empty(count * row_bytes, np.uint8)
        self.model.read_into(self.info, first * row_bytes, raw.data)
        return _decoded(self.info.type, raw, count, self.n)

    def importance_of(self, row: int) -> tuple[F32 | None, F32 | None]:
        """What encodes and what counts a row."""
        place = row // self.rows_per_slice
        encoding = None if self.encoding is None else self.encoding[place]
        return encoding, None if self.counting is None else self.counting[place]

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of pieces that lie in one slice and are small enough."""
        most = max(1, _WEIGHTS // self.n)
        row, end = first, self.rows if last is None else last
        while row < end:
            count = min(most, end - row, self.rows_per_slice - row % self.rows_per_slice)
            yield row, count
            row += count


class Disturber:
    """Makes disturbed weights, on `threads` threads. Close it."""

    def __init__(self, threads: int) -> None:
        self.encoder, self.threads = GgmlEncoder(), max(1, threads)
        self._pool = ThreadPoolExecutor(self.threads)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def quantized(self, kind: GGMLType, rows: F32, importance: F32 | None) -> F32:
        """Rows [count, n] through the blocks of `kind` and back."""
        count, n = rows.shape
        if not kind.is_quantized:
            return _decoded(kind, stored(self.encoder, kind, rows), count, n)
        out = np.empty(count * kind.row_bytes(n), np.uint8)
        if importance is not None and kind.imatrix == "unused":
            importance = None
        self.encoder.encode(kind, rows, importance, out)
        return _decoded(kind, out, count, n)

    def write(
        self, weights: Weights, kind: str, loaded: GGMLType, put: Callable[[int, Bytes], None], *, noise: bool = False
    ) -> Sums:
        """Hand the whole tensor, disturbed and in the type `loaded`, to put(byte offset, data); gives its error."""
        wanted = ggml_type(kind)
        row_bytes = loaded.row_bytes(weights.n)
        mixing = _Noise(weights) if noise else None

        def work(piece: tuple[int, int]) -> tuple[int, Bytes, Sums]:
            first, count = piece
            rows = np.ascontiguousarray(weights.read(first, count))
            encoding, counting = weights.importance_of(first)
            after = self.quantized(wanted, rows, encoding)
            if mixing is not None:
                after = rows + mixing.like(after - rows, first)
            sums = Sums()
            sums.add(rows, after, counting)
            return first, stored(self.encoder, loaded, after), sums

        total = Sums()
        for first, data, sums in self._pool.map(work, weights.blocks()):
            put(first * row_bytes, data)
            total += sums
        return total

    def map(self, work: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
        """`work` on each item by the threads, in order."""
        return self._pool.map(work, items)


def stored(encoder: GgmlEncoder, kind: GGMLType, rows: F32) -> Bytes:
    """Rows [count, n] as a tensor of `kind` holds them, without importance."""
    rows = np.ascontiguousarray(rows, np.float32)
    if kind.name == "F32":
        return rows.view(np.uint8).reshape(-1)
    if kind.name == "F16" and float(np.abs(rows).max(initial=0)) > 65504:
        raise InputError("weights above 65504 do not fit the F16 tensor that is loaded", hint="disturb a Q8_0 file")
    out = np.empty(rows.shape[0] * kind.row_bytes(rows.shape[1]), np.uint8)
    encoder.encode(kind, rows, None, out)
    return out


def _decoded(kind: GGMLType, raw: Bytes, count: int, n: int) -> F32:
    out = np.empty(count * n, np.float32)
    return Decoder(kind).decode(raw, out).reshape(count, n)


class _Noise:
    """Random matrices of rank 32 whose columns are as large as those of the real error, piece by piece.

    The right factors are shared by all pieces of a slice. Its columns are scaled in each piece, so that the error of a
    slice of several pieces has a rank above 32.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.seed = int.from_bytes(hashlib.sha256(weights.info.name.encode()).digest()[:8], "little")

    def like(self, error: F32, first: int) -> F32:
        place = first // self.weights.rows_per_slice
        right = np.random.default_rng([self.seed, place]).standard_normal((RANK, error.shape[1]))
        left = np.random.default_rng([self.seed, place, first + 1]).standard_normal((error.shape[0], RANK))
        noise = left @ right
        size = np.sqrt(np.square(error, dtype=np.float64).sum(axis=0) / np.square(noise).sum(axis=0))
        shaped: F32 = (noise * size).astype(np.float32)
        return shaped
