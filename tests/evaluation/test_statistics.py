"""Intervals and tests against scipy, against twins that write every draw out, and against the truth they must cover."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from apex_quant.errors import InputError, UsageError
from apex_quant.evaluation import bootstrap
from apex_quant.evaluation.statistics import (
    MIN_CHUNKS,
    MIN_TAIL,
    Interval,
    mcnemar,
    mean_interval,
    paired_difference,
    ppl_error,
    ppl_interval,
    quantile,
    quantile_difference,
    quantile_interval,
    share_difference,
    standard_error,
    wilson,
)

Array = NDArray[Any]
Sample = tuple[Array, Array]
RUNS = 1000


def ends(found: Interval) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


# --- coverage: what the issue asks for, at the smallest number of chunks ---


def _correlated(random: np.random.Generator, chunks: int, size: int) -> Array:
    """Normal values [chunks, size], each correlated by 0.6 with the one before."""
    z = random.standard_normal((chunks, size))
    for i in range(1, size):
        z[:, i] = 0.6 * z[:, i - 1] + 0.8 * z[:, i]
    return z


def _gamma_chunks(random: np.random.Generator) -> Sample:
    """Chunk effect gamma (coefficient of variation 0.7) times lognormal tokens."""
    effect = random.gamma(2, 0.5, MIN_CHUNKS)
    values = effect[:, None] * np.exp(_correlated(random, MIN_CHUNKS, 64) - 0.5)
    return values.reshape(-1), np.repeat(np.arange(MIN_CHUNKS), 64)


def _lognormal_chunks(random: np.random.Generator) -> Sample:
    """Chunk effect lognormal (coefficient of variation 0.53) times lognormal tokens."""
    effect = np.exp(0.5 * random.standard_normal(MIN_CHUNKS) - 0.125)
    values = effect[:, None] * np.exp(_correlated(random, MIN_CHUNKS, 64) - 0.5)
    return values.reshape(-1), np.repeat(np.arange(MIN_CHUNKS), 64)


def _unequal_chunks(random: np.random.Generator) -> Sample:
    """Chunks of 8 to 127 tokens."""
    chunk = np.repeat(np.arange(MIN_CHUNKS), random.integers(8, 128, MIN_CHUNKS))
    effect = random.gamma(2, 0.5, MIN_CHUNKS)
    return effect[chunk] * random.lognormal(-0.5, 1, chunk.size), chunk


def _sized_chunks(random: np.random.Generator) -> Sample:
    """Long chunks diverge more: the mean over tokens is not that over chunks. Truth 1 all the same."""
    size = random.integers(16, 97, MIN_CHUNKS)  # mean 56, mean square 56^2 + (81^2 - 1) / 12
    chunk = np.repeat(np.arange(MIN_CHUNKS), size)
    effect = random.gamma(3, 1 / 3, MIN_CHUNKS) * size * 56 / (56**2 + (81**2 - 1) / 12)
    return effect[chunk] * random.lognormal(-0.5, 1, chunk.size), chunk


@pytest.mark.parametrize("sample", [_gamma_chunks, _lognormal_chunks, _unequal_chunks, _sized_chunks])
def test_coverage_at_the_fewest_chunks(sample: Callable[[np.random.Generator], Sample]) -> None:
    """Mean 1 by construction; 95 % intervals of 1,000 runs cover it in 93 to 97 % of them."""
    covered = 0
    for run in range(RUNS):
        values, blocks = sample(np.random.default_rng([11, run]))
        low, high = ends(mean_interval(values, blocks, seed=run))
        covered += low <= 1 <= high
    assert 930 <= covered <= 970


def test_the_normal_interval_over_tokens_would_not_cover() -> None:
    """Why chunks: the same data with llama-perplexity's standard error."""
    covered = 0
    for run in range(RUNS):
        values, _ = _gamma_chunks(np.random.default_rng([11, run]))
        covered += abs(values.mean() - 1) <= 1.96 * standard_error(values)
    assert covered < 600


def test_coverage_of_the_paired_difference() -> None:
    """b is a third better on a shared text: the difference covers the truth, and never is said to go the other way."""
    covered = shown = wrong = 0
    for run in range(RUNS):
        random = np.random.default_rng([12, run])
        values, blocks = _gamma_chunks(random)
        noise = random.lognormal(-0.08, 0.4, (2, values.size))
        found = paired_difference(values * noise[0], values * noise[1] / 1.5, blocks, seed=run).interval
        low, high = ends(found)
        covered += low <= 1 / 3 <= high
        shown += low > 0
        wrong += high < 0
    assert 930 <= covered <= 970
    assert shown == RUNS
    assert wrong == 0


def test_how_often_equal_models_look_different() -> None:
    """Independent noise on the same text: zero is excluded in about 5 % of the runs."""
    false = 0
    for run in range(RUNS):
        random = np.random.default_rng([13, run])
        values, blocks = _gamma_chunks(random)
        noise = random.lognormal(-0.08, 0.4, (2, values.size))
        false += paired_difference(values * noise[0], values * noise[1], blocks, seed=run).interval.excludes_zero()
    assert 30 <= false <= 70


@pytest.mark.slow
def test_coverage_of_the_tail_difference() -> None:
    """99.9 % values of two models and their difference, on 100,352 tokens, where 100 values are beyond them."""
    random = np.random.default_rng(5)
    effect = random.gamma(4, 0.25, 1 << 24)
    truth = [float(np.quantile(effect * np.exp(s * random.standard_normal(effect.size)), 0.999)) for s in (1.2, 1.15)]
    both = single = 0
    for run in range(150):
        random = np.random.default_rng([7, run])
        chunk = np.repeat(np.arange(98), 1024)
        effect, z = random.gamma(4, 0.25, 98)[chunk], random.standard_normal((2, chunk.size))
        a = effect * np.exp(1.2 * z[0])
        b = effect * np.exp(1.15 * (0.9 * z[0] + math.sqrt(0.19) * z[1]))
        low, high = ends(quantile_difference(a, b, chunk, 0.999, draws=1000, seed=run))
        both += low <= truth[0] - truth[1] <= high
        low, high = ends(quantile_interval(a, chunk, 0.999, draws=1000, seed=run))
        single += low <= truth[0] <= high
    assert both >= 0.92 * 150
    assert single >= 0.92 * 150


# --- the mean: a twin that writes the draws out, and scipy ---


def _twin(values: Array, blocks: Array, level: float, draws: int, seed: int) -> tuple[float, float]:
    """The definition, chunk by chunk, on the same draws."""
    names = np.unique(blocks)
    chunks = [values[blocks == name] for name in names]
    m = len(chunks)

    def estimate(some: list[Array]) -> tuple[float, float]:
        total = sum(len(one) for one in some)
        ratio = sum(float(one.sum()) for one in some) / total
        squares = sum((float(one.sum()) - ratio * len(one)) ** 2 for one in some)
        return ratio, math.sqrt(m / (m - 1) * squares) / total

    ratio, error = estimate(chunks)
    picked = np.random.default_rng(seed).integers(0, m, (draws, m))
    t = []
    for row in picked:
        other, spread = estimate([chunks[i] for i in row])
        t.append((other - ratio) / spread)
    # scipy's order statistics at (draws + 1) p: Weibull's plotting position
    low, high = stats.mstats.mquantiles(t, [(1 - level) / 2, (1 + level) / 2], alphap=0, betap=0)
    least = stats.norm.ppf((1 + level) / 2)
    return ratio - error * max(high, least), ratio - error * min(low, -least)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    chunks=st.integers(MIN_CHUNKS, 60),
    level=st.sampled_from([0.8, 0.95, 0.99]),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_mean_is_the_definition(seed: int, chunks: int, level: float, offset: float) -> None:
    random = np.random.default_rng(seed)
    blocks = np.repeat(random.permutation(1000)[:chunks], random.integers(1, 9, chunks))
    values = offset + random.gamma(1.5, 1, blocks.size)
    order = random.permutation(blocks.size)
    found = mean_interval(values[order], blocks[order], level=level, draws=300, seed=seed)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert (found.n, found.chunks, found.note) == (values.size, chunks, None)
    assert ends(found) == pytest.approx(_twin(values, blocks, level, 300, seed), rel=1e-7, abs=1e-9 * offset)


def test_mean_near_scipys_intervals() -> None:
    """Near-normal chunk means: Student's interval over them, and scipy's own bootstrap of them."""
    random = np.random.default_rng(3)
    means = random.normal(5, 1, 200)
    blocks = np.repeat(np.arange(200), 16)
    spread = random.normal(0, 1, (200, 16))
    values = means[:, None] + spread - spread.mean(axis=1, keepdims=True)
    low, high = ends(mean_interval(values, blocks, draws=20000))
    width = high - low
    student = stats.t.interval(0.95, 199, means.mean(), means.std(ddof=1) / math.sqrt(200))
    assert (low, high) == pytest.approx(student, abs=0.04 * width)
    drawn = stats.bootstrap((means,), np.mean, method="percentile", n_resamples=9999, rng=np.random.default_rng(1))
    assert (low, high) == pytest.approx(tuple(drawn.confidence_interval), abs=0.04 * width)


def test_mean_shifts_and_scales() -> None:
    values, blocks = _gamma_chunks(np.random.default_rng(1))
    low, high = ends(mean_interval(values, blocks))
    assert ends(mean_interval(3 * values + 10, blocks)) == pytest.approx((3 * low + 10, 3 * high + 10))
    assert ends(mean_interval(-values, blocks)) == pytest.approx((-high, -low), rel=0.05)
    assert high - np.mean(values) > np.mean(values) - low  # skewed data: the long side is the upper one


def test_same_seed_same_numbers() -> None:
    values, blocks = _gamma_chunks(np.random.default_rng(1))
    assert mean_interval(values, blocks) == mean_interval(values, blocks)
    assert mean_interval(values, blocks) != mean_interval(values, blocks, seed=1)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_draws_in_parts_are_the_same(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(bootstrap.draw_chunks(40, 100, 5)))
    assert whole.shape == (100, 40)
    assert (whole.sum(axis=1) == 40).all()
    monkeypatch.setattr(bootstrap, "_CELLS", 40 * step)
    assert np.array_equal(np.concatenate(list(bootstrap.draw_chunks(40, 100, 5))), whole)


# --- too few, and values without spread ---


def test_too_few_chunks() -> None:
    values = np.arange(31 * 4.0)
    found = mean_interval(values, np.repeat(np.arange(31), 4))
    assert found == Interval(61.5, None, None, 124, "too few: 31 chunks, an interval takes at least 32", 31)
    assert found.to_json() == {"value": 61.5, "low": None, "high": None, "n": 124, "note": found.note, "chunks": 31}
    assert not found.excludes_zero()
    assert mean_interval(np.append(values, 1), np.append(np.repeat(np.arange(31), 4), 31)).low is not None
    assert mean_interval([], []) == Interval(None, None, None, 0, "no values", 0)


def test_no_spread() -> None:
    """A model against itself, and chunks that all agree: an interval without width."""
    blocks = np.repeat(np.arange(40), 5)
    assert mean_interval(np.zeros(200), blocks)[:3] == (0, 0, 0)
    value, low, high, *_ = mean_interval(np.full(200, 0.1), blocks)
    assert value == low == high == pytest.approx(0.1)
    assert not mean_interval(np.zeros(200), blocks).excludes_zero()


def test_one_chunk_differs() -> None:
    """A third of the draws miss the only chunk that is not zero: nothing bounds the mean from above."""
    values = np.zeros(200)
    values[:5] = 1
    found = mean_interval(values, np.repeat(np.arange(40), 5))
    assert found.value == pytest.approx(0.025)
    assert (found.low, found.high) == (None, None)
    assert found.note is not None
    assert "too few chunks differ" in found.note


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
def test_not_finite(bad: float) -> None:
    values = np.ones(100)
    values[[7, 9]] = bad
    for call in (mean_interval, ppl_interval):
        with pytest.raises(InputError, match=r"value 7 of 100 is (nan|-?inf|1e\+200); 2 are not finite"):
            call(values, np.arange(100))
    with pytest.raises(InputError, match="value 7"):
        quantile_interval(values, np.arange(100), 0.5)
    with pytest.raises(InputError, match="value 7"):
        paired_difference(values, np.ones(100), np.arange(100))


def test_wrong_use() -> None:
    for call, says in (
        (lambda: mean_interval([1.0, 2.0], [1]), "chunk numbers for 1"),
        (lambda: mean_interval([1.0], [1], level=1), "not a level"),
        (lambda: mean_interval([1.0], [1], draws=10), "draws are too few"),
        (lambda: mean_interval([1.0], [1], level=0.9999), "at least 20,000"),
        (lambda: paired_difference([1.0], [1.0, 2.0], [1]), "cannot be paired"),
        (lambda: quantile_difference([1.0], [1.0, 2.0], [1], 0.5), "chunk numbers|cannot be paired"),
        (lambda: quantile([1.0], 1.5), "not a quantile"),
        (lambda: wilson(3, 2), "not a share"),
        (lambda: wilson(1, 2, level=0), "not a level"),
        (lambda: mcnemar(-1, 2), "not negative"),
        (lambda: share_difference(2, 2, 3), "not a share"),
    ):
        with pytest.raises(UsageError, match=says):
            call()


# --- quantiles ---


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    q=st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 0.998, 1.0]),
    ties=st.booleans(),
    half=st.sampled_from([0, 3, 50]),
)
def test_drawn_quantiles_are_those_of_values_written_out(seed: int, q: float, ties: bool, half: int) -> None:
    """Also from windows far too narrow, which must grow."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 12))
    block = np.repeat(np.arange(count), random.integers(1, 30, count))
    x = random.integers(0, 5, block.size).astype(float) if ties else random.normal(size=block.size)
    order = np.argsort(x, kind="stable")
    draws = np.concatenate(list(bootstrap.draw_chunks(count, 20, seed)))
    sizes = np.bincount(block, minlength=count).astype(float)
    found = bootstrap.weighted_quantiles(draws, x[order], block[order], sizes, q, half)
    for weights, one in zip(draws, found, strict=True):
        written = np.repeat(x, weights[block].astype(int))
        assert one == pytest.approx(np.quantile(written, q), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9, 0.98])
def test_quantile_interval_inverts_the_share(q: float) -> None:
    """Value by value, away from the quantile, while the interval of the share from it on holds 1 - q."""
    random = np.random.default_rng(2)
    blocks = np.repeat(np.arange(40), random.integers(3, 12, 40))
    values = random.gamma(2, 1, 40)[blocks] * random.lognormal(0, 1, blocks.size)
    found = quantile_interval(values, blocks, q, draws=400, seed=4)
    ranked = np.sort(values)

    def holds(k: int) -> bool:
        share = mean_interval(values >= ranked[k], blocks, draws=400, seed=4)
        return share.low is None or share.high is None or share.low <= 1 - q <= share.high

    first = last = int(q * values.size)
    while first > 0 and holds(first - 1):
        first -= 1
    while last < values.size - 1 and holds(last + 1):
        last += 1
    assert ends(found) == (ranked[first], ranked[last])
    assert found.value == np.quantile(values, q)
    assert ranked[first] < found.value < ranked[last]


def test_quantile_interval_moves_with_the_values() -> None:
    """Any increasing map of the values maps the ends; equal values have equal ends."""
    random = np.random.default_rng(2)
    blocks = np.repeat(np.arange(50), 21)
    values = random.gamma(2, 1, 50)[blocks] * random.lognormal(0, 1, blocks.size)
    plain = quantile_interval(values, blocks, 0.9)
    assert ends(quantile_interval(np.log(values), blocks, 0.9)) == pytest.approx(tuple(map(math.log, ends(plain))))
    assert quantile_interval(np.full(1050, 2.0), blocks, 0.9)[:3] == (2, 2, 2)
    assert quantile_interval(values, blocks, 0.9) == plain


def test_quantile_difference_is_the_expanded_percentile_interval() -> None:
    random = np.random.default_rng(2)
    blocks = np.repeat(np.arange(50), 20)
    values = random.gamma(2, 1, 50)[blocks] * random.lognormal(0, 1, (2, 1000))
    found = quantile_difference(values[0], values[1], blocks, 0.9, draws=999, seed=4)
    picked = np.random.default_rng(4).integers(0, 50, (999, 50))
    a, b = values.reshape(2, 50, 20)
    drawn = [np.quantile(a[row].reshape(-1), 0.9) - np.quantile(b[row].reshape(-1), 0.9) for row in picked]
    tail = stats.norm.cdf(-math.sqrt(50 / 49) * stats.t.ppf(0.975, 49))
    wanted = stats.mstats.mquantiles(drawn, [tail, 1 - tail], alphap=0, betap=0)
    assert ends(found) == pytest.approx(tuple(wanted), rel=1e-6)
    assert found.value == pytest.approx(np.quantile(a, 0.9) - np.quantile(b, 0.9))


@pytest.mark.parametrize("freedom", [31, 63, 1000])
@pytest.mark.parametrize("p", [0.8, 0.95, 0.975, 0.995])
def test_students_quantile(freedom: int, p: float) -> None:
    assert bootstrap.student(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), abs=1e-4)


def test_tail_takes_a_hundred_values_beyond() -> None:
    values = np.linspace(0, 1, MIN_TAIL)
    assert quantile(values, 0.999).value == pytest.approx(0.999)
    few = quantile(values[1:], 0.999)
    assert few.value is None
    assert few.note == "too few: 99,999 values, the 99.9 % value takes at least 100,000"
    assert quantile(values, 0.9999).value is None
    assert quantile(values[:50], 0.99).value is not None
    assert quantile(values[:50], 1).value == values[49]
    assert quantile([], 0.5) == Interval(None, None, None, 0, "no values")
    blocks = np.arange(MIN_TAIL) % 40
    assert quantile_interval(values, blocks, 0.999, draws=100).low is not None
    assert quantile_interval(values[1:], blocks[1:], 0.999)[:3] == (None, None, None)
    assert quantile_difference(values[1:], values[1:], blocks[1:], 0.999)[:3] == (None, None, None)
    thirty = quantile_interval(values, np.arange(MIN_TAIL) % 30, 0.999)
    assert thirty.value == pytest.approx(0.999)
    assert (thirty.low, thirty.high) == (None, None)


def test_quantile_difference_is_paired() -> None:
    """A shift of the same values: every draw differs by the shift, so the interval has no width."""
    random = np.random.default_rng(2)
    blocks = np.repeat(np.arange(40), 100)
    values = random.gamma(2, 1, 40)[blocks] * random.lognormal(0, 1, 4000)
    found = quantile_difference(values + 0.5, values, blocks, 0.99, draws=200)
    assert found[:3] == pytest.approx((0.5, 0.5, 0.5))
    assert quantile_difference(values, values, blocks, 0.99, draws=200)[:3] == (0, 0, 0)


# --- paired means, perplexity ---


def test_shares() -> None:
    found = paired_difference([1.0, 2, 3, 4], [2.0, 2, 2, 2], [0, 1, 2, 3])
    assert (found.lower, found.higher, found.equal) == (0.25, 0.5, 0.25)
    assert found.interval.value == 0.5


def test_pairing_removes_what_texts_have_in_common() -> None:
    values, blocks = _gamma_chunks(np.random.default_rng(3))
    low, high = ends(paired_difference(values, values * 0.99, blocks).interval)
    assert 0 < low < 0.01 * values.mean() < high
    wide = ends(mean_interval(values, blocks))
    assert high - low < (wide[1] - wide[0]) / 50


def test_perplexity() -> None:
    """As tools/perplexity computes it from the sums of nll and its square."""
    nll = np.random.default_rng(0).gamma(2, 1.2, 4000)
    n, mean = nll.size, nll.sum() / nll.size
    error = math.sqrt(((nll**2).sum() / n - mean**2) / (n - 1))
    assert ppl_error(nll) == pytest.approx((math.exp(mean), math.exp(mean) * error))
    assert standard_error(nll) == pytest.approx(stats.sem(nll))
    blocks = np.repeat(np.arange(40), 100)
    found, logs = ppl_interval(nll, blocks), mean_interval(nll, blocks)
    assert found.value == pytest.approx(math.exp(mean))
    assert ends(found) == pytest.approx(tuple(math.exp(x) for x in ends(logs)))
    assert ppl_interval(nll[:10], blocks[:10]).low is None
    assert math.isnan(standard_error([1.0]))
    assert ppl_error([1000.0, 1000.0])[0] == math.inf


# --- shares ---


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 5000), part=st.floats(0, 1), level=st.sampled_from([0.8, 0.95, 0.999]))
def test_wilson_is_scipys(n: int, part: float, level: float) -> None:
    hits = round(part * n)
    wanted = stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    found = wilson(hits, n, level=level)
    assert found.value == hits / n
    assert ends(found) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert wilson(0, n).low == 0
    assert wilson(n, n).high == 1


@settings(max_examples=200, deadline=None)
@given(b=st.integers(0, 3000), c=st.integers(0, 3000))
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    wanted = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(wanted, rel=1e-9, abs=1e-200)
    assert mcnemar(b, c) == mcnemar(c, b)


def test_mcnemar_by_hand() -> None:
    """All outcomes of 10 coins, of which those at least as far from 5 as 2 count."""
    far = sum(abs(sum(coins) - 5) >= 3 for coins in itertools.product((0, 1), repeat=10))
    assert mcnemar(2, 8) == far / 1024
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 20000) == 0  # below what a float holds
    assert mcnemar(7000, 7000) == 1


def test_share_difference_covers() -> None:
    """The exact coverage over all outcomes of 60 tasks, for several shares that only one of the two has right."""
    n = 60
    for p, q in ((0.05, 0.05), (0.1, 0.2), (0.02, 0.1), (0.3, 0.3), (0.01, 0.01)):
        covered = 0.0
        for b in range(n + 1):
            for c in range(n + 1 - b):
                low, high = ends(share_difference(b, c, n))
                if low <= p - q <= high:
                    covered += stats.multinomial.pmf([b, c, n - b - c], n, [p, q, 1 - p - q])
        assert 0.935 <= covered <= 1, (p, q)


def test_share_difference() -> None:
    found = share_difference(30, 10, 400)
    assert found.value == 0.05
    first, second = 31 / 402, 11 / 402
    half = stats.norm.ppf(0.975) * math.sqrt((first + second - (first - second) ** 2) / 402)
    assert ends(found) == pytest.approx((first - second - half, first - second + half))
    assert found.excludes_zero()
    none = share_difference(0, 0, 400)
    low, high = ends(none)
    assert low == -high < 0
    assert share_difference(2, 0, 2).high == 1
    assert share_difference(0, 0, 0).value is None
