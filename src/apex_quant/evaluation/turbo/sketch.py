"""The paper's optional residual sketch (QJL): one sign a value that makes inner products unbiased.

Of the residual r that a codec leaves, sign(S r) and |r| are kept, S a matrix of independent normal values. Then
sqrt(pi/2)/m |r| S' sign(S r) has the expectation r over S (TurboQuant, arXiv 2504.19874, algorithm 2; QJL, arXiv
2406.03482). Forks leave it out: it takes a bit a value, and attention minds its variance more than the bias.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import UsageError
from apex_quant.evaluation.turbo.hadamard import F32


class Sketch(NamedTuple):
    """Of n residuals: float16 lengths [n] and signs as packed bits, uint8 [n, m / 8]."""

    lengths: NDArray[np.float16]
    signs: NDArray[np.uint8]


def projection(width: int, seed: int) -> F32:
    """S, float32 [width, width] of independent standard normal values."""
    return np.random.default_rng(seed).standard_normal((width, width), dtype=np.float32)


def sketch(residual: F32, matrix: F32) -> Sketch:
    """Signs and lengths of residuals, float32 [n, d], under `matrix` [m, d], m a multiple of 8. Raises UsageError."""
    if residual.ndim != 2 or residual.shape[1] != matrix.shape[1] or matrix.shape[0] % 8:
        raise UsageError(f"residuals of shape {residual.shape} do not fit a projection of shape {matrix.shape}")
    lengths = np.linalg.norm(residual, axis=1).astype(np.float16)
    return Sketch(lengths, np.packbits(residual @ matrix.T >= 0, axis=1))


def estimate(made: Sketch, matrix: F32) -> F32:
    """The residuals' unbiased estimate, float32 [n, d]: adding it to what a codec rebuilt makes inner products with
    any vector right on average over projections, and its squared error larger."""
    m = matrix.shape[0]
    values = np.unpackbits(made.signs, axis=1, count=m).astype(np.float32) * 2 - 1
    scale = (math.sqrt(math.pi / 2) / m) * made.lengths.astype(np.float32)
    found: F32 = (values @ matrix) * scale[:, None]
    return found
