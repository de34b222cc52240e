"""Estimates with their errors: intervals that respect the correlation of tokens in a chunk, and paired tests.

Tokens of one chunk share their text, so they are no independent observations: whole chunks are resampled. Every
function is deterministic (its own generator, seeded), takes plain arrays and gives plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation.bootstrap import (
    draw_chunks,
    drawn_quantiles,
    expanded,
    order_statistics,
    ratio_interval,
)

MIN_CHUNKS: Final = 32
"""Fewer chunks give a value without an interval."""
MIN_TAIL: Final = 100_000
"""Fewer values give no 99.9 % value: it takes 100 of them beyond it."""
LEVEL: Final = 0.95
DRAWS: Final = 2000

_LARGEST = 1e100  # squares of what is larger are not finite
_BEYOND = 100
_TAIL = 1 - _BEYOND / MIN_TAIL  # quantiles from here on need _BEYOND values beyond them


class Interval(NamedTuple):
    """An estimate from `n` values in `chunks` chunks; `note` says why there is no value or no interval (None)."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    note: str | None = None
    chunks: int | None = None

    def to_json(self) -> dict[str, Any]:
        """value, low, high and n; note and chunks where there are any."""
        always = ("value", "low", "high", "n")
        return {key: item for key, item in self._asdict().items() if key in always or item is not None}

    def excludes_zero(self) -> bool:
        """Whether there is an interval and zero is not in it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


class Difference(NamedTuple):
    """Mean of a - b, and the shares of values where a is lower, higher and equal."""

    interval: Interval
    lower: float
    higher: float
    equal: float


def mean_interval(
    values: ArrayLike, blocks: ArrayLike, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Mean of `values` F[n] with its studentized block bootstrap interval; `blocks` I[n] is the chunk of each value.

    Chunks may have different numbers of values: the mean is the ratio R = sum(S_j) / sum(N_j) of chunk sums and
    chunk sizes, with the linearised variance m/(m-1) sum((S_j - R N_j)^2) / sum(N_j)^2 over the m chunks. Every draw
    takes m chunks with replacement and gives t = (R* - R) / se*; the interval is R - se q(t) with the quantiles of t
    exchanged (Efron and Tibshirani 1993, 12.5; Hall 1988: second order correct for skewed data, where the
    percentile and the normal interval are not). Neither end is nearer than the normal interval's: on the short side
    of few heavy-tailed chunks the drawn quantile is too near, and paired differences would find one between equal
    models in 8 % of the comparisons instead of 5 %.

    Fewer than MIN_CHUNKS chunks: no interval. Raises InputError for values that are not finite.
    """
    x, block, count = _checked(values, blocks, level, draws)
    if not x.size:
        return Interval(None, None, None, 0, "no values", 0)
    sums = np.bincount(block, x, count).astype(np.float64)
    sizes = np.bincount(block, minlength=count).astype(np.float64)
    ratio = float(sums.sum() / x.size)
    if count < MIN_CHUNKS:
        return Interval(ratio, None, None, x.size, _few_chunks(count), count)
    low, high = ratio_interval(sums, sizes, level, draw_chunks(count, draws, seed))
    if not (math.isfinite(low) and math.isfinite(high)):
        return Interval(ratio, None, None, x.size, "no interval: too few chunks differ from the others", count)
    return Interval(ratio, low, high, x.size, None, count)


def quantile_interval(
    values: ArrayLike, blocks: ArrayLike, q: float, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """The `q` quantile of `values` F[n] (linear between order statistics, as llama-perplexity's) and its interval.

    The interval holds every value x for which the interval of the share of values from x on, that of `mean_interval`,
    holds 1 - q (Woodruff 1952, by inversion instead of a shift). A quantile from 99.9 % on needs 100 values beyond it
    (MIN_TAIL), else there is no value; intervals need MIN_CHUNKS. Raises InputError for values that are not finite.
    """
    x, block, count = _checked(values, blocks, level, draws)
    value = quantile(x, q)
    if value.value is None or count < MIN_CHUNKS:
        return value._replace(chunks=count, note=value.note or _few_chunks(count))
    order = np.argsort(x, kind="stable")
    sizes = np.bincount(block, minlength=count).astype(np.float64)
    weights = list(draw_chunks(count, draws, seed))

    def share(first: int) -> tuple[float, float]:
        """Interval of the share of values from the order statistic `first` on."""
        beyond = np.bincount(block[order[first:]], minlength=count).astype(np.float64)
        return ratio_interval(beyond, sizes, level, weights)

    middle = min(int(q * x.size), x.size - 1)
    first = middle - _reach(middle, lambda step: share(middle - step)[0] <= 1 - q)
    last = middle + _reach(x.size - 1 - middle, lambda step: share(middle + step)[1] >= 1 - q)
    # x beyond which too few values lie may miss the quantile itself, by the rounding of ranks
    low, high = min(float(x[order[first]]), value.value), max(float(x[order[last]]), value.value)
    return Interval(value.value, low, high, x.size, None, count)


def quantile(values: ArrayLike, q: float) -> Interval:
    """The `q` quantile without interval; None with a note where the tail has too few values."""
    x = np.asarray(values, np.float64).reshape(-1)
    if not 0 <= q <= 1:
        raise UsageError(f"{q} is not a quantile: 0 to 1")
    needed = 1 if q < _TAIL - 1e-12 or q == 1 else math.ceil(round(_BEYOND / (1 - q), 6))
    if x.size < needed:
        few = f"too few: {x.size:,} values, the {100 * q:g} % value takes at least {needed:,}"
        return Interval(None, None, None, x.size, few if x.size else "no values")
    return Interval(float(np.quantile(x, q)), None, None, x.size)


def paired_difference(
    a: ArrayLike, b: ArrayLike, blocks: ArrayLike, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Difference:
    """Mean of a - b over the same tokens, F[n] each, with the interval of `mean_interval`. Raises as that."""
    x, y = np.asarray(a, np.float64).reshape(-1), np.asarray(b, np.float64).reshape(-1)
    if x.size != y.size:
        raise UsageError(f"{x.size} values cannot be paired with {y.size}")
    interval = mean_interval(x - y, blocks, level=level, draws=draws, seed=seed)
    shares = [float(np.mean(found)) if x.size else 0.0 for found in (x < y, x > y, x == y)]
    return Difference(interval, *shares)


def quantile_difference(
    a: ArrayLike, b: ArrayLike, blocks: ArrayLike, q: float,
    *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0,
) -> Interval:  # fmt: skip
    """The `q` quantile of a minus that of b, F[n] each on the same tokens; rules as for `quantile_interval`.

    Every draw takes the same chunks for both, so what their texts have in common cancels. The interval is the
    percentile one, at levels widened for the number of chunks (Hesterberg 2015, "What teachers should know about the
    bootstrap", the expanded percentile interval).
    """
    x, block, count = _checked(a, blocks, level, draws)
    y, _, _ = _checked(b, blocks, level, draws)
    if x.size != y.size:
        raise UsageError(f"{x.size} values cannot be paired with {y.size}")
    first, second = quantile(x, q), quantile(y, q)
    if first.value is None or second.value is None:
        return first._replace(chunks=count)
    value = first.value - second.value
    if count < MIN_CHUNKS:
        return Interval(value, None, None, x.size, _few_chunks(count), count)
    drawn = [drawn_quantiles(one, block, count, q, draws, seed) for one in (x, y)]
    low, high = order_statistics(drawn[0] - drawn[1], expanded(level, count))
    return Interval(value, low, high, x.size, None, count)


def standard_error(values: ArrayLike) -> float:
    """Of the mean of independent values: s / sqrt(n) with n - 1 in s. NaN below two values."""
    x = np.asarray(values, np.float64).reshape(-1)
    return float(x.std(ddof=1)) / math.sqrt(x.size) if x.size > 1 else math.nan


def ppl_error(nlls: ArrayLike) -> tuple[float, float]:
    """Perplexity exp(mean nll) and llama-perplexity's uncertainty of it: perplexity times the standard error.

    That error takes tokens for independent, which those of one text are not: `ppl_interval` does not.
    """
    x = np.asarray(nlls, np.float64).reshape(-1)
    value = exp(float(x.mean())) if x.size else math.nan
    return value, value * standard_error(x)


def ppl_interval(
    nlls: ArrayLike, blocks: ArrayLike, *, level: float = LEVEL, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Perplexity with the interval of the mean nll over chunks, both ends raised to e."""
    found = mean_interval(nlls, blocks, level=level, draws=draws, seed=seed)
    value, low, high = (None if x is None else exp(x) for x in found[:3])
    return found._replace(value=value, low=low, high=high)


def exp(x: float) -> float:
    """e to the x, infinity where that is too large."""
    return math.exp(x) if x < 709 else math.inf


def wilson(hits: int, n: int, *, level: float = LEVEL) -> Interval:
    """A share with its score interval (Wilson 1927), without continuity correction."""
    if not 0 <= hits <= n:
        raise UsageError(f"{hits} of {n} is not a share")
    if n == 0:
        return Interval(None, None, None, 0, "no tasks")
    z, p = _z(level), hits / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # exactly 0 and 1 at the ends, which rounding would miss
    low, high = 0.0 if hits == 0 else max(0.0, centre - half), 1.0 if hits == n else min(1.0, centre + half)
    return Interval(p, low, high, n)


def mcnemar(b: int, c: int) -> float:
    """Two-sided exact p of McNemar's test: b tasks only the first has right, c only the second.

    Under equal accuracy b is binomial in b + c with 1/2; p is twice the smaller tail, at most 1.
    """
    if b < 0 or c < 0:
        raise UsageError("numbers of tasks are not negative")
    n, tail, term = b + c, 0, 1
    for k in range(min(b, c) + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << n))  # integers until here: exact


def share_difference(b: int, c: int, n: int, *, level: float = LEVEL) -> Interval:
    """Difference (b - c) / n of two accuracies on the same n tasks, with the interval of Bonett and Price (2012).

    That is Wald's interval after one task is added to each of b and c: near its level down to few tasks, and of
    positive width when the two never disagree. It is centred a little nearer to zero than the value.
    """
    if b < 0 or c < 0 or b + c > n:
        raise UsageError(f"{b} + {c} of {n} is not a share")
    if n == 0:
        return Interval(None, None, None, 0, "no tasks")
    first, second = (b + 1) / (n + 2), (c + 1) / (n + 2)
    centre = first - second
    half = _z(level) * math.sqrt((first + second - centre * centre) / (n + 2))
    return Interval((b - c) / n, max(-1.0, centre - half), min(1.0, centre + half), n)


def _reach(most: int, holds: Callable[[int], bool]) -> int:
    """How many steps from 0 on hold, at most `most`: in doubling strides, then by bisection between the last two.

    Far out, where too few values lie beyond for any interval, it would hold again: what counts is connected with 0.
    """
    reached, stride = 0, 1
    while stride <= most and holds(stride):
        reached, stride = stride, 2 * stride
    low, high = reached, min(stride, most + 1)  # low holds, high does not or is too far
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _z(level: float) -> float:
    _check_level(level)
    return NormalDist().inv_cdf(0.5 + level / 2)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UsageError(f"{level} is not a level: between 0 and 1, as 0.95")


def _least_draws(level: float) -> int:
    """So many that both ends lie between draws."""
    return max(100, math.ceil(round(2 / (1 - level), 6)))


def _few_chunks(count: int) -> str:
    return f"too few: {count} chunks, an interval takes at least {MIN_CHUNKS}"


def _checked(
    values: ArrayLike, blocks: ArrayLike, level: float, draws: int
) -> tuple[NDArray[np.float64], NDArray[np.intp], int]:
    """Values as float64, their chunks numbered from 0 without gaps, the number of chunks."""
    _check_level(level)
    if draws < _least_draws(level):
        raise UsageError(f"{draws} draws are too few for a level of {level}: at least {_least_draws(level):,}")
    x = np.asarray(values, np.float64).reshape(-1)
    names = np.asarray(blocks).reshape(-1)
    if x.size != names.size:
        raise UsageError(f"{x.size} values, but chunk numbers for {names.size}")
    bad = np.flatnonzero(~(np.abs(x) <= _LARGEST))
    if bad.size:
        more = f"; {bad.size} are not finite or beyond {_LARGEST:g}"
        raise InputError(f"value {bad[0]} of {x.size} is {x[bad[0]]}{more}")
    found, number = np.unique(names, return_inverse=True)
    return x, number.reshape(-1), found.size
