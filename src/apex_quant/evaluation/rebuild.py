"""Logits from final hidden states: times the output matrix, as the library multiplies them.

The library rounds what it multiplies with a matrix to a type that suits the matrix: to bfloat16 for a BF16 one, to
blocks of 8 bits for quantized ones. States kept in that type give the same logits to a few float32 roundings; which
type it was is found by trying (another backend may not round at all).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError
from apex_quant.gguf import GGMLType, GGUFModel, ggml_type

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]

_KEPT_BYTES = 64 << 20  # a matrix of at most so many bytes as float32 is kept, others are read block by block
_BLOCK_FLOATS = 4 << 20  # of the matrix, and of the logits of one block
_READ = 4 << 20


def to_bf16(values: F32) -> U16:
    """Nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bf16(values: U16) -> F32:
    return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_f16(values: F32) -> U16:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, np.float32).astype(np.float16).view(np.uint16)


def from_f16(values: U16) -> F32:
    return values.view(np.float16).astype(np.float32)


def _to_q8_0(values: F32) -> U8:
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, 32)
    step = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    packed = np.empty((len(blocks), 34), np.uint8)
    packed[:, :2] = step.astype("<f2").view(np.uint8)
    packed[:, 2:] = np.rint(blocks * inverse).astype(np.int8).view(np.uint8)
    return packed.reshape(len(values), -1)


def _from_q8_0(kept: U8) -> F32:
    blocks = kept.reshape(-1, 34)
    step = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    made: F32 = blocks[:, 2:].view(np.int8).astype(np.float32) * step
    return made.reshape(len(kept), -1)


def _to_q8_k(values: F32) -> U8:
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, 256)
    far = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    inverse = np.divide(np.float32(-127), far, out=np.zeros_like(far), where=far != 0)
    step = np.divide(np.float32(1), inverse, out=np.zeros_like(far), where=far != 0)
    packed = np.empty((len(blocks), 260), np.uint8)
    packed[:, :4] = step.astype("<f4").view(np.uint8)
    packed[:, 4:] = np.minimum(np.rint(blocks * inverse), 127).astype(np.int8).view(np.uint8)
    return packed.reshape(len(values), -1)


def _from_q8_k(kept: U8) -> F32:
    blocks = kept.reshape(-1, 260)
    step = np.ascontiguousarray(blocks[:, :4]).view("<f4").astype(np.float32)
    made: F32 = blocks[:, 4:].view(np.int8).astype(np.float32) * step
    return made.reshape(len(kept), -1)


class StateType(NamedTuple):
    """How hidden states are kept: `bytes` for `block` of them; to and from bytes, [n, n_embd] and [n, row bytes]."""

    block: int
    bytes: int
    encode: Callable[[F32], U8]
    decode: Callable[[U8], F32]

    def row_bytes(self, n_embd: int) -> int:
        """ValueError when n_embd is no multiple of the block."""
        if n_embd % self.block:
            raise ValueError(f"rows of {n_embd} in blocks of {self.block}")
        return n_embd // self.block * self.bytes


STATES: Final = {
    "bf16": StateType(1, 2, lambda x: to_bf16(x).view(np.uint8), lambda kept: from_bf16(kept.view("<u2"))),
    "f16": StateType(1, 2, lambda x: to_f16(x).view(np.uint8), lambda kept: from_f16(kept.view("<u2"))),
    "q8_0": StateType(32, 34, _to_q8_0, _from_q8_0),
    "q8_K": StateType(256, 260, _to_q8_k, _from_q8_k),
}


@dataclass
class OutputMatrix:
    """The matrix that makes logits of hidden states. `shape` (n_embd, vocabulary); `data(start, size)` reads bytes.

    Logits are multiplied with `scale`, then bounded: softcap * tanh(logits / softcap), when `softcap` is not 0.
    """

    tensor: str
    type: GGMLType
    shape: tuple[int, int]
    data: Callable[[int, int], bytes]
    scale: float = 1.0
    softcap: float = 0.0
    _kept: F32 | None = field(default=None, repr=False)

    @classmethod
    def of(cls, model: GGUFModel, tensor: str) -> OutputMatrix:
        """That of an open model, which must stay open. Raises InputError."""
        info = model.tensors.get(tensor)
        if info is None or len(info.shape) != 2:
            raise InputError(f"{model.path}: has no output matrix {tensor}")
        softcap = float(model.get("{arch}.final_logit_softcapping", 0.0) or 0.0)
        rows, columns = info.shape
        return cls(tensor, info.type, (rows, columns), lambda start, size: model.read(info, start, size), 1.0, softcap)

    @property
    def nbytes(self) -> int:
        return self.type.row_bytes(self.shape[0]) * self.shape[1]

    def sha256(self) -> str:
        """Of the matrix's bytes."""
        digest = hashlib.sha256()
        for start in range(0, self.nbytes, _READ):
            digest.update(self.data(start, min(_READ, self.nbytes - start)))
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        about = {"tensor": self.tensor, "type": self.type.name, "shape": list(self.shape), "sha256": self.sha256()}
        return {**about, "scale": self.scale, "softcap": self.softcap}

    def blocks(self, hidden: F32) -> Iterator[tuple[int, F32]]:
        """Logits of `hidden` F32 [n, n_embd], in blocks of the vocabulary."""
        n_embd, vocabulary = self.shape
        step = max(256, _BLOCK_FLOATS // max(n_embd, len(hidden)))
        for start in range(0, vocabulary, step):
            logits = hidden @ self._rows(start, min(start + step, vocabulary)).T
            if self.scale != 1:
                logits *= np.float32(self.scale)
            if self.softcap:
                logits = np.float32(self.softcap) * np.tanh(logits / np.float32(self.softcap))
            yield start, logits

    def _rows(self, first: int, last: int) -> F32:
        n_embd, vocabulary = self.shape
        if self._kept is None and 4 * n_embd * vocabulary <= _KEPT_BYTES:
            self._kept = self._read(0, vocabulary)
        return self._kept[first:last] if self._kept is not None else self._read(first, last)

    def _read(self, first: int, last: int) -> F32:
        size = self.type.row_bytes(self.shape[0])
        raw = np.frombuffer(self.data(first * size, (last - first) * size), np.uint8)
        if self.type.name == "BF16":
            return from_bf16(raw.view(np.uint16)).reshape(last - first, -1)
        kind = gguf.GGMLQuantizationType(self.type.id)
        values: F32 = gguf.quants.dequantize(raw.reshape(last - first, size), kind)
        return values.astype(np.float32, copy=False).reshape(last - first, -1)


def matrix_from_json(about: dict[str, Any], data: Callable[[int, int], bytes]) -> OutputMatrix:
    """The matrix that to_json() describes, with its bytes from `data`."""
    rows, columns = about["shape"]
    kind = ggml_type(about["type"])
    return OutputMatrix(about["tensor"], kind, (rows, columns), data, float(about["scale"]), float(about["softcap"]))
