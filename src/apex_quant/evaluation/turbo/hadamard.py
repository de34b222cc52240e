"""The signed Walsh-Hadamard transform: a random rotation that costs n log n additions and keeps lengths."""

from __future__ import annotations

import functools
from typing import Final

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import UsageError

F32 = NDArray[np.float32]

SEED: Final = 0x9E3779B9


def hadamard(x: F32) -> F32:
    """The orthonormal Walsh-Hadamard transform of the last axis, float32 [..., n] with n a power of two.

    It is symmetric and its own inverse. Raises UsageError for other n.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise UsageError(f"a Walsh-Hadamard transform takes a power of two values, not {n}")
    made = np.ascontiguousarray(x, np.float32).reshape(-1, n)
    half = 1
    while half < n:
        pairs = made.reshape(-1, n // (2 * half), 2, half)
        made = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2)
        half *= 2
    return (made.reshape(x.shape) * np.float32(n**-0.5)).astype(np.float32, copy=False)


@functools.cache
def signs(n: int, which: int = 0) -> F32:
    """`n` fixed signs, float32 [n]: the highest bits of a 64-bit linear congruential sequence (Knuth's MMIX).

    Forks have fixed tables of their own; which signs they are changes no expected error.
    """
    state, made = SEED + which, np.empty(n, np.float32)
    for place in range(n):
        state = (6364136223846793005 * state + 1442695040888963407) % (1 << 64)
        made[place] = 1 - 2 * (state >> 63)
    made.flags.writeable = False
    return made


def rotate(x: F32) -> F32:
    """S2 H S1 x of the last axis, with H the transform and S the fixed signs."""
    n = x.shape[-1]
    return hadamard(x * signs(n)) * signs(n, 1)


def rotate_back(y: F32) -> F32:
    """The inverse of rotate(): S1 H S2 y."""
    n = y.shape[-1]
    return hadamard(y * signs(n, 1)) * signs(n)
