"""Logits kept in memory: exact where all are kept, a close lower bound where only the likeliest are."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from apex_quant.allocation import kept
from apex_quant.allocation.kept import KeptLogits
from apex_quant.errors import InputError
from apex_quant.evaluation.scores import NotFinite, Scorer

RNG = np.random.default_rng(5)
ROWS, VOCABULARY = 300, 5000
REFERENCE = (RNG.standard_normal((ROWS, VOCABULARY)) * 3).astype(np.float32)
TEST = (REFERENCE + RNG.standard_normal((ROWS, VOCABULARY)) * 0.3).astype(np.float32)
TARGETS = RNG.integers(0, VOCABULARY, ROWS)


def expected() -> float:
    p, q = log_softmax(REFERENCE.astype(np.float64), axis=1), log_softmax(TEST.astype(np.float64), axis=1)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def measured(one: KeptLogits, test: np.ndarray = TEST) -> float:
    for start in range(0, ROWS, 100):
        one.add(REFERENCE[start : start + 100])
    parts = [one.divergence(i, test[i * 100 : i * 100 + 100], TARGETS[i * 100 : i * 100 + 100]) for i in range(3)]
    return float(np.concatenate(parts).mean())


def test_whole() -> None:
    one = KeptLogits(ROWS, VOCABULARY, Scorer())
    assert one.whole
    assert measured(one) == pytest.approx(expected(), rel=1e-5)
    assert measured(KeptLogits(ROWS, VOCABULARY, Scorer()), REFERENCE) == 0


def test_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    values = []
    for count in (500, 2000, 4999):
        monkeypatch.setattr(kept, "KEPT", count)
        one = KeptLogits(ROWS, VOCABULARY, Scorer(2), most_bytes=1 << 20)
        assert not one.whole
        values.append(measured(one))
        assert 0 < one.rest < 1
    assert values == sorted(values)
    assert values[1] > 0.9 * expected()  # much of this flat distribution is lumped together
    assert values[2] == pytest.approx(expected(), rel=1e-4)
    same = KeptLogits(ROWS, VOCABULARY, Scorer(), most_bytes=1 << 20)
    assert abs(measured(same, REFERENCE)) < 1e-9


@pytest.mark.parametrize("most_bytes", [1 << 30, 1])
def test_not_finite(most_bytes: int) -> None:
    broken = REFERENCE.copy()
    broken[3, 7] = np.nan
    with pytest.raises(InputError, match="NaN"):
        KeptLogits(ROWS, VOCABULARY, Scorer(), most_bytes=most_bytes).add(broken)


@pytest.mark.parametrize("most_bytes", [1 << 30, 1])
def test_a_broken_probe_is_no_measurement(most_bytes: int) -> None:
    """In either form; and a token that is never said is no such thing."""
    one = KeptLogits(ROWS, VOCABULARY, Scorer(), most_bytes=most_bytes)
    one.add(REFERENCE)
    for value in (np.nan, np.inf):
        broken = TEST.copy()
        broken[3, 7] = value
        with pytest.raises(NotFinite) as caught:
            one.divergence(0, broken, TARGETS)
        assert caught.value.row == 3
    never = TEST.copy()
    never[:, np.argmin(REFERENCE.sum(axis=0))] = -np.inf
    assert np.isfinite(one.divergence(0, never, TARGETS)).all()
