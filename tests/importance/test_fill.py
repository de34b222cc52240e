"""Filling against its formula, its limits, and the matrix that stock reads from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import Value
from apex_quant.importance import Importance, fill
from apex_quant.importance.fill import (
    DEFAULT_STRENGTH,
    applied,
    blind_tensors,
    parse_prior,
    prior_of,
    prior_text,
)
from tests.helpers.stock import imatrix_weights

EXPERTS = "blk.0.ffn_up_exps.weight"
DENSE = "blk.0.attn_q.weight"
HEADS = "blk.0.attn_k_b.weight"
SUMS = np.array([[3.0, 9.0, 0.0], [7.0, 7.0, 7.0], [128.0, 0.5, 1.0], [0.0, 64.0, 2.0]])
COUNTS = np.array([3, 0, 64, 6000])


def matrix(sums: Any = SUMS, counts: Any = COUNTS, **about: Any) -> Importance:
    return Importance.from_arrays(
        {EXPERTS: (sums, counts), DENSE: ([[1.0, 2.0]], [9]), HEADS: ([[1.0], [5.0]], [9, 2])}, **about
    )


def oracle(sums: Any, counts: Any, strength: float) -> Any:
    """The formula, in float64; sums without tokens do not count."""
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)[:, None]
    sums = np.where(counts > 0, sums, 0)
    mean = sums.sum(axis=0) / counts.sum()
    return (sums + strength * mean) / (counts + strength)


def test_formula() -> None:
    filled = fill(matrix())
    np.testing.assert_allclose(filled.weights(EXPERTS), oracle(SUMS, COUNTS, 64.0), rtol=3e-7)
    mean = np.array([131.0, 73.5, 3.0]) / 6067
    assert filled.weights(EXPERTS)[1].tolist() == mean.astype(np.float32).tolist()  # no tokens: exactly the mean
    half_way = (SUMS[2] / 64 + mean) / 2  # as many tokens as the prior is worth
    np.testing.assert_allclose(filled.weights(EXPERTS)[2], half_way, rtol=3e-7)
    assert filled.entries[EXPERTS].counts.tolist() == [3, 1, 64, 6000]
    assert filled.prior == "shrink K=64"


def test_what_is_no_expert_stays() -> None:
    raw = matrix()
    filled = fill(raw)
    for name in (DENSE, HEADS):  # heads have rows too, and nothing to do with one another
        assert filled.entries[name] is raw.entries[name]


def test_no_expert_with_data() -> None:
    raw = matrix(counts=[0, 0, 0, 0])
    assert blind_tensors(raw) == [EXPERTS]
    assert fill(raw).weights(EXPERTS).tolist() == np.ones((4, 3)).tolist()
    assert blind_tensors(matrix()) == []


CASES = st.integers(2, 6).flatmap(
    lambda rows: st.tuples(
        hnp.arrays(np.float32, (rows, 4), elements=st.floats(0, 2.0**30, width=32)),
        hnp.arrays(np.int64, rows, elements=st.integers(0, 1 << 20)).filter(lambda counts: counts.any()),
    )
)


@settings(max_examples=80, deadline=None)
@given(case=CASES, strength=st.floats(1e-3, 1e6))
def test_formula_of_anything(case: Any, strength: float) -> None:
    sums, counts = case
    weights = fill(matrix(sums, counts), strength).weights(EXPERTS)
    np.testing.assert_allclose(weights, oracle(sums, counts, strength), rtol=1e-6, atol=1e-37)
    # between the expert's own mean and that of all
    own = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], np.nan)
    mean = np.where(counts[:, None] > 0, sums, 0).sum(axis=0, dtype=float) / counts.sum()
    low, high = np.fmin(own, mean), np.fmax(own, mean)
    assert (weights >= low * (1 - 1e-6) - 1e-37).all()
    assert (weights <= high * (1 + 1e-6) + 1e-37).all()


@settings(max_examples=60, deadline=None)
@given(case=CASES)
def test_limits(case: Any) -> None:
    """A prior worth nothing changes only experts without tokens; one worth everything makes all experts equal."""
    sums, counts = case
    raw, seen = matrix(sums, counts), counts > 0
    none, whole = fill(raw, 1e-12).weights(EXPERTS), fill(raw, 1e18).weights(EXPERTS)
    mean = np.where(seen[:, None], sums, 0).sum(axis=0, dtype=float) / counts.sum()
    # 1e-12 tokens of the mean over at least one of its own
    np.testing.assert_allclose(none[seen], raw.weights(EXPERTS)[seen], rtol=1e-6, atol=1e-12 * mean.max() + 1e-37)
    np.testing.assert_allclose(whole, np.tile(mean, (len(counts), 1)), rtol=1e-6, atol=1e-37)
    np.testing.assert_array_equal(none[~seen], np.tile(mean.astype(np.float32), ((~seen).sum(), 1)))


@settings(max_examples=40, deadline=None)
@given(case=CASES, data=st.data())
def test_parts_are_those_of_the_whole(case: Any, data: st.DataObject) -> None:
    """Sums are computed when asked for: any range gives the same bits."""
    entry = fill(matrix(*case)).entries[EXPERTS]
    whole = entry.sums.reshape(-1)
    start = data.draw(st.integers(0, entry.size - 1))
    n = data.draw(st.integers(1, entry.size - start))
    assert entry.read(start, n).tobytes() == whole[start : start + n].tobytes()


def test_filled_file(tmp_path: Path) -> None:
    """Written, read by another reader, and read again: the very weights that were computed."""
    extras = {EXPERTS + ".apex_in_sum": -SUMS, "blk.0.apex_router": [[1.0, 2.0]]}
    matrix(extras=extras, metadata={"apex.library": Value.string("x")}, chunk_count=3).write(tmp_path / "raw.gguf")
    with Importance.read(tmp_path / "raw.gguf") as raw:
        filled = fill(raw, 10)
        filled.write(tmp_path / "filled.gguf")
        in_memory = filled.weights(EXPERTS)
        assert (filled.sha256, filled.file_name) == (None, None)
    assert imatrix_weights(tmp_path / "filled.gguf")[EXPERTS].tobytes() == in_memory.tobytes()
    with Importance.read(tmp_path / "filled.gguf") as read:
        assert read.weights(EXPERTS).tobytes() == in_memory.tobytes()
        assert (read.prior, read.chunk_count) == ("shrink K=10", 3)
        assert {key: value.data for key, value in read.metadata.items()} == {
            "apex.library": "x",
            "apex.prior": "shrink K=10",
        }
        np.testing.assert_array_equal(read.extras[EXPERTS + ".apex_in_sum"].values, -SUMS.astype(np.float32))
        with pytest.raises(InputError, match=r"filled\.gguf is filled already \(shrink K=10\)"):
            fill(read)
        assert applied(read, "shrink K=64") is read
        assert prior_of(read, "none") == prior_of(read, "prior") == "shrink K=10"


def test_legacy(tmp_path: Path) -> None:
    matrix().write_dat(tmp_path / "m.dat")
    with Importance.read(tmp_path / "m.dat") as legacy:
        assert prior_of(legacy, "prior") == "none"
        with pytest.raises(InputError, match=r"m\.dat has no counts per expert"):
            fill(legacy)


@pytest.mark.parametrize("strength", [0, -1, float("nan"), float("inf")])
def test_strengths_that_are_none(strength: float) -> None:
    with pytest.raises(UsageError, match="must be a positive number"):
        fill(matrix(), strength)


@given(st.floats(1e-300, 1e300))
def test_text_of_a_rule(strength: float) -> None:
    assert parse_prior(prior_text(strength)) == strength


def test_rules() -> None:
    raw = matrix()
    assert prior_of(raw, "prior") == prior_text(DEFAULT_STRENGTH) == "shrink K=64"
    assert prior_of(raw, "none") == "none"
    assert applied(raw, "none") is raw
    assert applied(raw, "shrink K=2").weights(EXPERTS).tobytes() == fill(raw, 2).weights(EXPERTS).tobytes()
    with pytest.raises(UsageError, match="'most' is no rule for filling: choose prior or none"):
        prior_of(raw, "most")
    for text in ("", "shrink K=", "shrink K=0", "shrink K=1e999", "shrink K=--", "shrink K=5 ", "grow"):
        with pytest.raises(InputError, match="is no rule"):
            parse_prior(text)
    assert matrix(metadata={"apex.prior": Value.u8(3)}).prior == "3"
