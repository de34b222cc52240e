"""The bootstrap under `statistics`: draws of chunks, studentized means, quantiles of a draw without writing it out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_CELLS = 1 << 22  # of a matrix of draws: 32 MiB


def draw_chunks(count: int, draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each chunk is in each draw of `count` chunks: F64 [some draws, count], `draws` rows in all."""
    random = np.random.default_rng(seed)
    step = max(1, _CELLS // count)
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        picked = random.integers(0, count, (rows, count))
        picked += count * np.arange(rows)[:, None]
        yield np.bincount(picked.reshape(-1), minlength=rows * count).reshape(rows, count).astype(np.float64)


def ratio_interval(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], level: float, weights: Iterable[NDArray[np.float64]]
) -> tuple[float, float]:
    """Interval of sum(S) / sum(N) from the sums and sizes of chunks, F64 [chunks] each, and the draws' chunk counts.

    The method is described at `statistics.mean_interval`. An end is infinite where the draws do not bound it.
    """
    count, total = sizes.size, float(sizes.sum())
    ratio = float(sums.sum()) / total
    # With S - R N in place of S the estimate is 0, and nothing cancels in the sums of squares.
    rest = sums - ratio * sizes
    columns = np.stack([rest, sizes, rest * rest, rest * sizes, sizes * sizes], axis=1)
    error = math.sqrt(count / (count - 1) * float(columns[:, 2].sum())) / total
    if error <= 1e-12 * abs(ratio):
        return ratio, ratio  # all chunks agree but for rounding
    t = np.concatenate([studentized(some @ columns, count, error) for some in weights])
    tail = (1 - level) / 2
    lower, upper = order_statistics(t, (tail, 1 - tail))
    least = NormalDist().inv_cdf(1 - tail)
    return ratio - error * max(upper, least), ratio - error * min(lower, -least)


def studentized(sums: NDArray[np.float64], count: int, error: float) -> NDArray[np.float64]:
    """t of each draw, from its sums of (S - R N), N, (S - R N)^2, (S - R N) N and N^2."""
    rest, size, squares, mixed, sizes = sums.T
    ratio = rest / size
    variance = count / (count - 1) * np.maximum(squares - 2 * ratio * mixed + ratio * ratio * sizes, 0) / size**2
    spread = np.sqrt(variance)
    # A draw of equal chunks has no spread: infinitely far from R, unless it is R.
    flat = spread <= 1e-7 * error
    t: NDArray[np.float64] = np.divide(ratio, spread, out=np.zeros_like(ratio), where=~flat)
    t[flat] = np.where(np.abs(ratio[flat]) <= 1e-7 * error, 0.0, np.copysign(np.inf, ratio[flat]))
    return t


def order_statistics(drawn: NDArray[np.float64], levels: tuple[float, float]) -> tuple[float, float]:
    """Quantiles at (draws + 1) p, which makes a bootstrap test of that size; infinite values stay what they are."""
    values = np.sort(drawn)
    ranks = [min(max(p * (values.size + 1) - 1, 0.0), values.size - 1.0) for p in levels]
    found = []
    for rank in ranks:
        below, above = values[math.floor(rank)], values[math.ceil(rank)]
        found.append(float(below if below == above else below + (rank - math.floor(rank)) * (above - below)))
    return found[0], found[1]


def expanded(level: float, count: int) -> tuple[float, float]:
    """Levels for percentiles so that the interval is as wide as Student's with the n - 1 variance is for a mean."""
    t = student(0.5 + level / 2, count - 1)
    tail = NormalDist().cdf(-t * math.sqrt(count / (count - 1)))
    return tail, 1 - tail


def student(p: float, freedom: int) -> float:
    """Quantile of Student's t by Cornish and Fisher's expansion: to 1e-4 from 30 degrees of freedom on."""
    z, v = NormalDist().inv_cdf(p), freedom
    z3, z5, z7 = z**3, z**5, z**7
    return (
        z
        + (z3 + z) / (4 * v)
        + (5 * z5 + 16 * z3 + 3 * z) / (96 * v**2)
        + (3 * z7 + 19 * z5 + 17 * z3 - 15 * z) / (384 * v**3)
    )


def drawn_quantiles(
    x: NDArray[np.float64], block: NDArray[np.intp], count: int, q: float, draws: int, seed: int
) -> NDArray[np.float64]:
    """The `q` quantile of each draw of chunks, exactly, as if its values were written out and sorted: F64 [draws].

    Only the sorted values near the quantile are walked through: how many of a draw lie below that window is one
    product of its chunk counts with the chunks' numbers of values there. A draw that leaves the window gets a
    wider one.
    """
    order = np.argsort(x, kind="stable")
    ranked, owner = x[order], block[order]
    sizes = np.bincount(block, minlength=count).astype(np.float64)
    half = 6 * math.sqrt(max(1.0, q * (1 - q) * x.size)) * 4 + 64
    found = [
        weighted_quantiles(weights, ranked, owner, sizes, q, math.ceil(half))
        for weights in draw_chunks(count, draws, seed)
    ]  # fmt: skip
    return np.concatenate(found)


def weighted_quantiles(
    weights: NDArray[np.float64],
    ranked: NDArray[np.float64],
    owner: NDArray[np.intp],
    sizes: NDArray[np.float64],
    q: float,
    half: int,
) -> NDArray[np.float64]:
    n, count = ranked.size, sizes.size
    centre = int(q * (n - 1))
    first, last = max(0, centre - half), min(n, centre + half + 1)
    # (total - 1) q and the next rank, counted from 0, of the values written out
    rank = (weights @ sizes - 1) * q
    lower, upper = np.floor(rank), np.minimum(np.floor(rank) + 1, weights @ sizes - 1)
    before = weights @ np.bincount(owner[:first], minlength=count).astype(np.float64)
    inside = weights @ np.bincount(owner[first:last], minlength=count).astype(np.float64)
    fits = (before <= lower) & (upper < before + inside)
    result = np.empty(len(weights))
    width = last - first
    for rows in np.array_split(np.flatnonzero(fits), max(1, int(fits.sum()) * width // _CELLS)):
        running = np.cumsum(weights[np.ix_(rows, owner[first:last])], axis=1)
        running += before[rows, None]
        at = [first + np.sum(running <= edge[rows, None], axis=1) for edge in (lower, upper)]
        low, high = ranked[at[0]], ranked[at[1]]
        result[rows] = low + (rank[rows] - lower[rows]) * (high - low)
    if not fits.all():
        wider = ~fits
        result[wider] = weighted_quantiles(weights[wider], ranked, owner, sizes, q, 4 * half + 64)
    return result
