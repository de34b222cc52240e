"""llama-perplexity's _logits_ files: log-probabilities in 16 bits, read as a reference and written.

Little-endian: 8 bytes `_logits_`, u32 context, i32 vocabulary, i32 chunks, the tokens as i32, then for each chunk
ctx - 1 - ctx/2 rows of 16-bit words: float32 scale, float32 smallest log-probability, one word for each token of the
vocabulary (padded to an even number). log p = scale * word + smallest; what is more than 16 below the largest is 0.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError
from apex_quant.evaluation.scores import F32, Blocks
from apex_quant.evaluation.steps import Step
from apex_quant.evaluation.watch import Routing
from apex_quant.runtime.tensors import I32

MAGIC: Final = b"_logits_"
_HEAD = struct.Struct("<8sIii")
_RANGE = np.float32(16)
_BLOCK = 4 << 20  # log-probabilities decoded at once
HEAD_BYTES: Final = _HEAD.size
_MAX_CTX, _MAX_VOCABULARY = 1 << 24, 1 << 24


def row_words(vocabulary: int) -> int:
    """16-bit words of one row."""
    return 2 * ((vocabulary + 1) // 2) + 4


class StockLogits:
    """An open file. `tokens` I32 [chunks, ctx]."""

    floor: float | None = -16.0
    domains: tuple[str, ...] = ("text",)

    def __init__(self, path: str | Path) -> None:
        """Raises InputError for a file that is no such file or is cut short."""
        self.path = Path(path)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            head = self._file.read(_HEAD.size)
            if len(head) < _HEAD.size or head[:8] != MAGIC:
                raise InputError(f"{path}: is no _logits_ file of llama-perplexity")
            _, self.ctx, self.vocabulary, chunks = _HEAD.unpack(head)
            if not (2 <= self.ctx <= _MAX_CTX and 0 < self.vocabulary <= _MAX_VOCABULARY and chunks > 0):
                raise InputError(f"{path}: context {self.ctx}, vocabulary {self.vocabulary}, {chunks} chunks")
            self.first = self.ctx // 2
            self.scored = self.ctx - 1 - self.first
            self._rows_at = _HEAD.size + 4 * self.ctx * chunks
            self._row = 2 * row_words(self.vocabulary)
            needed, size = self._rows_at + chunks * self.scored * self._row, os.fstat(self._file.fileno()).st_size
            if size < needed:
                raise InputError(
                    f"{path}: is cut short: {chunks} chunks take {needed} bytes, it has {size}",
                    hint="llama-perplexity was interrupted, or the copy is not complete",
                )
            tokens = np.frombuffer(self._file.read(4 * self.ctx * chunks), "<i4").reshape(chunks, self.ctx)
            self.tokens: I32 = tokens.astype(np.int32)
            if self.tokens.min() < 0 or self.tokens.max() >= self.vocabulary:
                raise InputError(f"{path}: holds tokens outside its vocabulary of {self.vocabulary}")
        except BaseException:
            self._file.close()
            raise
        self.domain = np.zeros(chunks, np.int16)

    def close(self) -> None:
        self._file.close()

    def words(self, chunk: int, first: int, last: int) -> NDArray[np.uint16]:
        """Scored tokens [first, last) of a chunk as they are in the file, uint16 [n, words]."""
        size = (last - first) * self._row
        raw = os.pread(self._file.fileno(), size, self._rows_at + (chunk * self.scored + first) * self._row)
        if len(raw) != size:
            raise InputError(f"{self.path}: became shorter while it was read")
        return np.frombuffer(raw, "<u2").reshape(last - first, -1)

    def take(self, step: Step) -> tuple[Blocks, Routing | None]:
        if not step.rows:
            return [], None
        rows = [self.words(chunk, step.scored.start, step.scored.stop) for chunk in step.chunks]
        return decode(rows[0] if len(rows) == 1 else np.concatenate(rows), self.vocabulary), None


def decode(words: NDArray[np.uint16], vocabulary: int) -> Iterator[tuple[int, F32]]:
    """Log-probabilities of rows [n, words], in blocks of the vocabulary."""
    head = np.ascontiguousarray(words[:, :4]).view("<f4")
    step = max(256, _BLOCK // len(words))
    for start in range(0, vocabulary, step):
        known = words[:, 4 + start : 4 + min(start + step, vocabulary)].astype(np.float32)
        known *= head[:, :1]
        known += head[:, 1:]
        yield start, known


def head(ctx: int, vocabulary: int, tokens: I32) -> bytes:
    """What comes before the rows; `tokens` [chunks, ctx]."""
    return _HEAD.pack(MAGIC, ctx, vocabulary, len(tokens)) + np.ascontiguousarray(tokens, "<i4").tobytes()


def encode(logits: F32) -> NDArray[np.uint16]:
    """Rows of the file for `logits` [n, vocabulary], uint16 [n, words]."""
    n, vocabulary = logits.shape
    top = logits.max(axis=1, keepdims=True)
    low = np.maximum(logits.min(axis=1, keepdims=True), top - _RANGE)
    weights = np.exp(logits - top)
    total = np.log(weights.sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (top - low) / np.float32(65535)
    rows = np.zeros((n, row_words(vocabulary)), "<u2")
    rows[:, :4] = np.ascontiguousarray(np.hstack([scale, low - top - total]).astype("<f4")).view("<u2")
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    np.subtract(logits, low, out=weights)
    weights *= inverse
    np.rint(weights, out=weights)
    np.clip(weights, 0, 65535, out=weights)
    rows[:, 4 : 4 + vocabulary] = weights
    return rows
