"""Blocks of 128 values in 34, 50 or 66 bytes: an fp16 norm, then 2, 3 or 4 bits a value.

A block is rotated (hadamard.py), divided by its length and scaled to unit variance; each coordinate goes to the
nearest level of the Lloyd-Max table of the normal distribution (TurboQuant, arXiv 2504.19874, algorithm 1). The norm
that is stored is not the block's own but the one that gives the rebuilt block the length it had (the "norm correction"
of TurboQuant+). Bytes, little-endian: fp16 norm; the codes' two low bits, four values a byte from the lowest bits up
(turbo4: four bits, two values a byte); turbo3 then has the codes' third bits, eight values a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation.turbo.hadamard import F32, rotate, rotate_back
from apex_quant.evaluation.turbo.lloyd_max import levels, thresholds

U8 = NDArray[np.uint8]

BLOCK: Final = 128
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class TurboType:
    """A type by its name in the forks; `bytes` of a block of 128 values."""

    name: str
    bits: int

    @property
    def bytes(self) -> int:
        return 2 + BLOCK * self.bits // 8

    @property
    def bits_per_value(self) -> float:
        """With the norm: 2.125, 3.125, 4.125."""
        return 8 * self.bytes / BLOCK


TURBO: Final = {name: TurboType(name, bits) for name, bits in (("turbo2", 2), ("turbo3", 3), ("turbo4", 4))}


def quantize(x: F32, bits: int, *, correct: bool = True) -> tuple[NDArray[np.float16], U8]:
    """Norms float16 [n] and codes uint8 [n, 128] in 0 .. 2^bits - 1 of blocks float32 [n, 128].

    `correct`: the norm is the one that restores the block's length; without it the block's own, as in the paper. A
    block of zeros has norm 0; norms beyond fp16's range are its largest. Raises InputError for values that are not
    finite, UsageError for other shapes or a number of bits without a table (1 to 4 have one).
    """
    x = np.ascontiguousarray(x, np.float32)
    if x.ndim != 2 or x.shape[1] != BLOCK:
        raise UsageError(f"blocks have {BLOCK} values: shape {x.shape} does not fit")
    largest = np.abs(x).max(axis=1, initial=0)
    if not np.isfinite(largest).all():
        raise InputError(f"block {int(np.flatnonzero(~np.isfinite(largest))[0])} has values that are not finite")
    # scaled by a power of two first: squares of large values are infinite in float32, of small ones zero
    scale = np.ldexp(np.float32(1), np.frexp(np.where(largest > 0, largest, 1))[1] - 1).astype(np.float64)
    rotated = rotate((x / scale[:, None]).astype(np.float32))
    lengths = np.sqrt(np.einsum("ij,ij->i", rotated, rotated, dtype=np.float64))
    unit = rotated * (BLOCK**0.5 / np.where(lengths > 0, lengths, 1))[:, None].astype(np.float32)
    codes = np.searchsorted(thresholds(bits), unit.reshape(-1)).astype(np.uint8).reshape(unit.shape)
    rebuilt = np.sqrt(np.square(levels(bits)[codes]).sum(axis=1) / BLOCK)
    return np.minimum(lengths * scale / (rebuilt if correct else 1), _LARGEST).astype(np.float16), codes


def dequantize(norms: NDArray[np.float16], codes: U8, bits: int) -> F32:
    """Blocks float32 [n, 128] of what quantize() gives."""
    table = (levels(bits) / BLOCK**0.5).astype(np.float32)
    return rotate_back(table[codes] * norms.astype(np.float32)[:, None])


def pack(norms: NDArray[np.float16], codes: U8, kind: TurboType) -> U8:
    """Blocks as bytes, uint8 [n, kind.bytes]."""
    parts = [np.ascontiguousarray(norms, "<f2").view(np.uint8).reshape(-1, 2)]
    if kind.bits == 4:
        parts.append(_packed(codes, 4))
    else:
        parts.append(_packed(codes & np.uint8(3), 2))
        if kind.bits == 3:
            parts.append(_packed(codes >> np.uint8(2), 1))
    return np.concatenate(parts, axis=1)


def unpack(blocks: U8, kind: TurboType) -> tuple[NDArray[np.float16], U8]:
    """Norms and codes of blocks, uint8 [n, kind.bytes] or their bytes behind one another.

    Raises InputError for a number of bytes that is not whole blocks, and for norms that are negative or not finite.
    """
    if blocks.dtype != np.uint8 or blocks.size % kind.bytes:
        raise InputError(f"{blocks.nbytes} bytes are not whole {kind.name} blocks of {kind.bytes}")
    rows = np.ascontiguousarray(blocks).reshape(-1, kind.bytes)
    norms = np.ascontiguousarray(rows[:, :2]).view("<f2").reshape(-1).astype(np.float16)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms >= 0)))
    if bad.size:
        raise InputError(f"{kind.name} block {bad[0]} has the norm {norms[bad[0]]}: a length is finite, not negative")
    if kind.bits == 4:
        return norms, _unpacked(rows[:, 2:], 4)
    low = 2 + BLOCK // 4
    codes = _unpacked(rows[:, 2:low], 2)
    return norms, codes | _unpacked(rows[:, low:], 1) << np.uint8(2) if kind.bits == 3 else codes


def encode(x: F32, kind: TurboType) -> U8:
    """Values float32 [..., n] with n a multiple of 128 to bytes, uint8 [..., n / 128 * kind.bytes]. Raises as
    quantize(), and UsageError for other n."""
    blocks = _blocks(x)
    return pack(*quantize(blocks, kind.bits), kind).reshape(*x.shape[:-1], -1)


def decode(data: U8, kind: TurboType) -> F32:
    """The inverse, as near as the type is. Raises as unpack()."""
    norms, codes = unpack(data, kind)
    return dequantize(norms, codes, kind.bits).reshape(*data.shape[:-1], -1)


def round_trip(x: F32, kind: TurboType) -> F32:
    """decode(encode(x)) without the bytes."""
    return dequantize(*quantize(_blocks(x), kind.bits), kind.bits).reshape(x.shape)


def _blocks(x: F32) -> F32:
    if not x.ndim or x.shape[-1] % BLOCK:
        raise UsageError(f"rows of {x.shape[-1] if x.ndim else 1} values are not whole blocks of {BLOCK}")
    return x.reshape(-1, BLOCK)


def _packed(codes: U8, bits: int) -> U8:
    """Codes of `bits` bits, from the lowest bits of a byte up."""
    per = 8 // bits
    groups = codes.reshape(len(codes), -1, per).astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    made: U8 = np.bitwise_or.reduce(groups << shifts, axis=2).astype(np.uint8)
    return made


def _unpacked(packed: U8, bits: int) -> U8:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    made: U8 = ((packed[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)).astype(np.uint8)
    return made.reshape(len(packed), BLOCK)
