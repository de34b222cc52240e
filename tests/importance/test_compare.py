"""Comparing and reporting against plain numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from apex_quant.errors import UsageError
from apex_quant.importance import Importance, compare, convert, fill, report, save

EXPERTS = "blk.3.ffn_up_exps.weight"
DENSE = "blk.0.attn_q.weight"
ROWS = hnp.arrays(np.float32, (3, 5), elements=st.floats(0, 2.0**20, width=32))
COUNTS = hnp.arrays(np.int64, 3, elements=st.integers(0, 100))


def matrix(sums: Any, counts: Any, **more: Any) -> Importance:
    return Importance.from_arrays({EXPERTS: (sums, counts), **more})


@settings(max_examples=80, deadline=None)
@given(x=ROWS, y=ROWS, m=COUNTS, n=COUNTS)
def test_numbers(x: Any, y: Any, m: Any, n: Any) -> None:
    a, b = matrix(x, m), matrix(y, n)
    (found,) = compare(a, b).entries
    both = (m > 0) & (n > 0)
    assert (found.uncovered_a, found.uncovered_b) == (int((m == 0).sum()), int((n == 0).sum()))
    assert (found.tokens_a, found.tokens_b) == (m.max(), n.max())
    if not both.any():
        assert (found.median, found.max, found.cosine) == (None, None, None)
        return
    u, v = (one.weights(EXPERTS)[both].astype(float).reshape(-1) for one in (a, b))
    relative = [abs(s - t) / max(s, t) if max(s, t) else 0.0 for s, t in zip(u, v, strict=True)]
    assert found.median == pytest.approx(np.median(relative), abs=1e-12)
    assert found.max == pytest.approx(max(relative), abs=1e-12)
    if u.any() and v.any():
        assert found.cosine == pytest.approx(u @ v / np.sqrt((u @ u) * (v @ v)), abs=1e-9)
    else:
        assert found.cosine is None
    (back,) = compare(b, a).entries
    assert (back.median, back.max) == (found.median, found.max)


def test_equal_and_scaled() -> None:
    a = matrix(np.arange(1, 16).reshape(3, 5), [4, 0, 8])
    (found,) = compare(a, a).entries
    assert (found.median, found.max, found.equal) == (0.0, 0.0, True)
    assert found.cosine == pytest.approx(1)
    twice = matrix(2 * np.arange(1, 16).reshape(3, 5), [4, 0, 8])
    (found,) = compare(a, twice).entries
    assert (found.median, found.max, found.equal) == (0.5, 0.5, False)
    assert found.cosine == pytest.approx(1)


def test_what_only_one_has(tmp_path: Path) -> None:
    rows = np.ones((3, 5))
    a = matrix(rows, [1, 2, 3], **{DENSE: ([[1.0, 2.0]], [1]), "blk.1.attn_q.weight": ([[1.0]], [1])})
    b = matrix(rows, [1, 2, 3], **{DENSE: ([[1.0]], [1]), "blk.2.attn_q.weight": ([[1.0]], [1])})
    a.write(tmp_path / "a.gguf")
    found = compare(tmp_path / "a.gguf", fill(b))
    assert (found.a, found.b, found.prior_a, found.prior_b) == ("a.gguf", "b", None, "shrink K=64")
    assert (found.only_a, found.only_b) == (("blk.1.attn_q.weight",), ("blk.2.attn_q.weight",))
    assert found.other_shape == (DENSE,)
    document = json.loads(json.dumps(found.to_json()))
    assert [row["name"] for row in document["entries"]] == [EXPERTS]


def test_most_different_first() -> None:
    base = {f"blk.{i}.attn_q.weight": ([[1.0, 1.0]], [1]) for i in range(3)}
    other = {f"blk.{i}.attn_q.weight": ([[1.0, 1.0 + i]], [1]) for i in range(3)}
    names = [e.name for e in compare(Importance.from_arrays(base), Importance.from_arrays(other)).entries]
    assert names == [f"blk.{i}.attn_q.weight" for i in (2, 1, 0)]


def test_legacy_against_gguf(tmp_path: Path) -> None:
    """The same matrix in both forms: equal but for rounding, though the .dat file has one row for all experts."""
    a = matrix(np.arange(1, 16).reshape(3, 5), [4, 7, 8], **{DENSE: ([[1.0, 2.0]], [3])})
    a.write(tmp_path / "a.gguf")
    saved = convert(tmp_path / "a.gguf", tmp_path / "a.dat")
    assert any("token counts per expert of 1 entries" in text for text in saved.warnings)
    found = compare(tmp_path / "a.gguf", tmp_path / "a.dat")
    assert found.other_shape == ()
    assert all(entry.max is not None and entry.max < 1e-6 for entry in found.entries)
    back = convert(tmp_path / "a.dat", tmp_path / "b.gguf")
    assert back.warnings == ()
    assert all(entry.equal for entry in compare(tmp_path / "a.dat", tmp_path / "b.gguf").entries)


def test_names_of_new_files(tmp_path: Path) -> None:
    a = matrix(np.ones((3, 5)), [1, 1, 1])
    with pytest.raises(UsageError, match=r"ends in \.gguf, or in \.dat"):
        save(a, tmp_path / "a.bin")
    saved = save(a, tmp_path / "a.gguf")
    assert saved.bytes == (tmp_path / "a.gguf").stat().st_size
    with pytest.raises(UsageError, match="exists already"):
        save(a, tmp_path / "a.gguf")
    assert save(a, tmp_path / "a.gguf", force=True).sha256 == saved.sha256
    filled = save(fill(a), tmp_path / "f.dat")
    assert filled.prior == "shrink K=64"
    assert any("the mark that it is filled" in text for text in filled.warnings)


def test_report() -> None:
    found = report(
        matrix(np.ones((3, 5)), [0, 63, 64], **{DENSE: ([[1.0, 2.0]], [0]), "output.weight": ([[1.0]], [9])})
    )
    rows = {entry.name: entry for entry in found.entries}
    assert (rows[EXPERTS].uncovered, rows[EXPERTS].thin, rows[EXPERTS].experts) == ((0,), (1,), 3)
    assert (rows[EXPERTS].tokens_min, rows[EXPERTS].tokens_median, rows[EXPERTS].tokens_max) == (0, 63.0, 64)
    assert (rows[DENSE].layer, rows[DENSE].experts, rows[DENSE].uncovered) == (0, 0, ())
    assert rows["output.weight"].layer is None
    assert found.to_json()["experts"] == {
        "uncovered": [{"layer": 3, "experts": [0]}],
        "thin": [{"layer": 3, "experts": [1]}],
    }
