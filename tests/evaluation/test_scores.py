"""Scores of rows of logits against float64 brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.errors import InputError
from apex_quant.evaluation.scores import NotFinite, Scorer, divergence, nll

ROWS, WORDS = 37, 1000


def rows(seed: int = 0, spread: float = 3.0, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    reference = (random.normal(size=(ROWS, WORDS)) * spread).astype(np.float32)
    test = (reference + random.normal(size=reference.shape) * noise).astype(np.float32)
    return reference, test, random.integers(0, WORDS, ROWS)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    made: np.ndarray = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return made


def brute(reference: np.ndarray, test: np.ndarray) -> np.ndarray:
    p, q = log_softmax(reference), log_softmax(test)
    made: np.ndarray = (np.exp(p) * (p - q)).sum(axis=1)
    return made


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("spread", "noise", "offset"), [(3, 0.1, 0), (0.01, 0.001, 5), (30, 4, -200), (3, 0.002, 0)])
def test_divergence(threads: int, spread: float, noise: float, offset: float) -> None:
    reference, test, targets = rows(1, spread, noise)
    test = test + np.float32(offset)
    made = divergence(reference, test, targets, threads=threads)
    tolerance = 1e-7 + 4e-7 * abs(offset) + 1e-6 * spread
    np.testing.assert_allclose(made.kld, brute(reference, test), rtol=1e-5, atol=tolerance)
    np.testing.assert_allclose(made.reverse, brute(test, reference), rtol=1e-5, atol=tolerance)
    chosen = np.arange(ROWS), targets
    np.testing.assert_allclose(made.nll, -log_softmax(test)[chosen], atol=1e-5 + 1e-7 * abs(offset))
    np.testing.assert_allclose(made.ref_nll, -log_softmax(reference)[chosen], atol=1e-5)
    assert (made.top1 == (reference.argmax(1) == test.argmax(1))).all()
    np.testing.assert_array_equal(made.nll, nll(test, targets, threads=threads))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, WORDS - 1), max_size=6, unique=True), st.integers(0, 1000))
def test_blocks_do_not_matter(cuts: list[int], seed: int) -> None:
    reference, test, targets = rows(seed)
    edges = [0, *sorted(cuts), WORDS]
    blocks = [(a, reference[:, a:b]) for a, b in itertools.pairwise(edges)]
    whole, cut = divergence(reference, test, targets), divergence(blocks, test, targets)
    np.testing.assert_allclose(cut.kld, whole.kld, atol=1e-6)
    np.testing.assert_allclose(cut.reverse, whole.reverse, atol=1e-6)
    np.testing.assert_allclose(cut.ref_nll, whole.ref_nll, atol=1e-6)
    np.testing.assert_array_equal(cut.top1, whole.top1)


def test_of_itself_is_nothing() -> None:
    reference, _, targets = rows(2, 8)
    made = divergence(reference, reference.copy(), targets)
    assert (made.kld == 0).all()
    assert (made.reverse == 0).all()
    assert made.top1.all()


def test_tokens_that_are_never_said() -> None:
    reference, test, targets = rows(3)
    reference[:, 10:20] = test[:, 10:20] = -np.inf
    targets[:] = 30
    made = divergence(reference, test, targets)
    keep = np.r_[0:10, 20:WORDS]
    np.testing.assert_allclose(made.kld, brute(reference[:, keep], test[:, keep]), atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(value: float) -> None:
    reference, test, targets = rows(4)
    broken = test.copy()
    broken[5, 7] = value
    for call, row in (
        (lambda: divergence(reference, broken, targets), "the model"),
        (lambda: divergence(broken, test, targets), "the reference"),
        (lambda: nll(broken, targets), "the model"),
    ):
        with pytest.raises(NotFinite, match=row) as caught:
            call()
        assert caught.value.row == 5


def test_blocks_that_do_not_cover() -> None:
    reference, test, targets = rows(5)
    for blocks in ([(0, reference[:, :-1])], [(1, reference[:, 1:])], [(0, np.hstack([reference, reference]))]):
        with pytest.raises(InputError):
            divergence(blocks, test, targets)


def test_log_probabilities_with_a_floor() -> None:
    """llama-perplexity's sum: what is at or below -16 is left out, and nothing is normalized."""
    reference, test, targets = rows(6, 6)
    known = log_softmax(reference).astype(np.float32)
    one = Scorer()
    made = one.divergence([(0, known[:, :300]), (300, known[:, 300:])], test, targets, floor=-16.0)
    wide = known.astype(np.float64)
    expected = np.where(known > -16, np.exp(wide) * (wide - log_softmax(test)), 0).sum(axis=1)
    np.testing.assert_allclose(made.kld, expected, atol=1e-6)
    np.testing.assert_allclose(made.ref_nll, -known[np.arange(ROWS), targets])
    assert np.isnan(made.reverse).all()
