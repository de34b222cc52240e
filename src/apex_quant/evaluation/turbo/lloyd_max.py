"""Lloyd-Max quantizers of the standard normal distribution: the levels with the least mean squared error.

Max, "Quantizing for minimum distortion" (1960) and Lloyd, "Least squares quantization in PCM" (1982): thresholds lie
midway between levels, levels are the means of the distribution between thresholds.
"""

from __future__ import annotations

import itertools
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import UsageError

F64 = NDArray[np.float64]

HALF_LEVELS: Final[dict[int, tuple[float, ...]]] = {
    1: (0.797884560802865,),
    2: (0.452780034636492, 1.510417608499095),
    3: (
        0.245094178944222,
        0.756005281205878,
        1.343909278505000,
        2.151945704536985,
    ),
    4: (
        0.128395029851147,
        0.388048299490292,
        0.656759118532465,
        0.942340456486963,
        1.256231197347179,
        1.618046386021883,
        2.069017226531386,
        2.732589570995158,
    ),
}
"""Positive levels for each number of bits, as solve() computes them (a test computes them again)."""

_MOST_BITS = 8
_STEPS = 20_000
_SMALL = 1e-15


def levels(bits: int) -> F64:
    """All 2^bits pinned levels, rising. Raises UsageError for a number of bits without a table."""
    if bits not in HALF_LEVELS:
        raise UsageError(f"no table of {bits} bits: 1 to {max(HALF_LEVELS)}")
    half = np.array(HALF_LEVELS[bits])
    return np.concatenate((-half[::-1], half))


def thresholds(bits: int) -> F64:
    """The 2^bits - 1 values between the levels."""
    known = levels(bits)
    return (known[1:] + known[:-1]) / 2


def solve(bits: int) -> F64:
    """Positive levels of the quantizer of `bits` bits, by Newton's method on the conditions of Lloyd and Max."""
    if not 1 <= bits <= _MOST_BITS:
        raise UsageError(f"{bits} bits: 1 to {_MOST_BITS}")
    count = 1 << (bits - 1)
    half = np.linspace(0, 3.0, 2 * count + 1)[1::2] * (0.5 + 0.1 * bits)
    for _ in range(_STEPS):
        wanted, slope = _centroids(half)
        system = np.eye(count)
        for i in range(count):
            # d centroid_i / d level: thresholds are halfway, so each moves by half of both neighbours
            if i > 0:
                system[i, i - 1] -= slope[i, 0] / 2
                system[i, i] -= slope[i, 0] / 2
            if i + 1 < count:
                system[i, i] -= slope[i, 1] / 2
                system[i, i + 1] -= slope[i, 1] / 2
        step = np.linalg.solve(system, wanted - half)
        moved = half + step
        if not (moved > 0).all() or not (np.diff(moved) > 0).all():
            moved = wanted  # Lloyd's own step always keeps the order
        change = float(np.abs(moved - half).max())
        half = moved
        if change < _SMALL:
            break
    return half


def distortion(bits: int) -> float:
    """Mean squared error of the pinned quantizer on a standard normal value: 1 - sum p_i level_i^2."""
    half = np.array(HALF_LEVELS[bits])
    edges = _edges(half)
    mass = np.array([_tail(low) - _tail(high) for low, high in itertools.pairwise(edges)])
    return float(1 - 2 * np.sum(mass * half**2))


def _edges(half: F64) -> list[float]:
    return [0.0, *((half[1:] + half[:-1]) / 2).tolist(), math.inf]


def _centroids(half: F64) -> tuple[F64, F64]:
    """Mean of the distribution in each cell, and its derivative by the cell's lower and upper edge [count, 2]."""
    edges, means, slopes = _edges(half), [], []
    for low, high in itertools.pairwise(edges):
        mass = _tail(low) - _tail(high)
        mean = (_density(low) - _density(high)) / mass
        means.append(mean)
        upper = _density(high) * (high - mean) / mass if math.isfinite(high) else 0.0
        slopes.append((_density(low) * (mean - low) / mass, upper))
    return np.array(means), np.array(slopes)


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def _tail(x: float) -> float:
    """Share of the distribution above x."""
    return math.erfc(x / math.sqrt(2)) / 2 if math.isfinite(x) else 0.0
