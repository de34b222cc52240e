"""Merging: sums of sums, the order does not matter, and what is no sum is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import Value
from apex_quant.importance import Importance, fill, merge
from tests.helpers.stock import imatrix_weights

EXPERTS = "blk.0.ffn_up_exps.weight"
DENSE = "blk.0.attn_q.weight"
SHAPES = {EXPERTS: (3, 2), DENSE: (1, 4), "blk.1.attn_q.weight": (1, 4), "output.weight": (1, 2)}


@st.composite
def matrices(draw: st.DrawFn) -> Importance:
    names = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    table = {}
    for name in names:
        rows, width = SHAPES[name]
        sums = draw(hnp.arrays(np.float32, (rows, width), elements=st.floats(0, 2.0**60, width=32)))
        table[name] = (sums, draw(hnp.arrays(np.int64, rows, elements=st.integers(0, 1 << 30))))
    return Importance.from_arrays(
        table,
        datasets=tuple(draw(st.lists(st.sampled_from("abc"), unique=True))),
        chunk_count=draw(st.integers(0, 1000)),
    )


def same(a: Importance, b: Importance, rtol: float) -> None:
    assert set(a.entries) == set(b.entries)
    assert a.chunk_count == b.chunk_count
    assert set(a.datasets) == set(b.datasets)
    for name, entry in a.entries.items():
        assert entry.counts.tolist() == b.entries[name].counts.tolist()
        np.testing.assert_allclose(entry.sums, b.entries[name].sums, rtol=rtol)


@settings(max_examples=60, deadline=None)
@given(a=matrices(), b=matrices(), c=matrices())
def test_order_does_not_matter(a: Importance, b: Importance, c: Importance) -> None:
    same(merge([a, b]), merge([b, a]), 0)
    same(merge([merge([a, b]), c]), merge([a, merge([b, c])]), 3e-7)
    same(merge([a, b, c]), merge([merge([a, b]), c]), 3e-7)
    same(merge([a]), a, 0)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(matrices(), min_size=2, max_size=4))
def test_sums_are_sums(parts: list[Importance]) -> None:
    merged = merge(parts)
    for name, (rows, width) in SHAPES.items():
        having = [part.entries[name] for part in parts if name in part.entries]
        if not having:
            assert name not in merged.entries
            continue
        sums = sum((entry.sums.astype(np.float64) for entry in having), np.zeros((rows, width)))
        assert merged.entries[name].sums.tobytes() == sums.astype(np.float32).tobytes()
        assert merged.entries[name].counts.tolist() == sum(entry.counts for entry in having).tolist()  # type: ignore[union-attr]


def one(value: float = 1.0, **about: Any) -> Importance:
    rows = np.full((3, 2), value)
    return Importance.from_arrays({EXPERTS: (rows, [2, 0, 5]), DENSE: (np.full((1, 4), value), [7])}, **about)


def test_files(tmp_path: Path) -> None:
    one(1, datasets=("x.txt", "y.txt"), chunk_count=2).write(tmp_path / "a.gguf")
    one(2, datasets=("y.txt", "z.txt"), chunk_count=3).write(tmp_path / "b.gguf")
    with merge([tmp_path / "a.gguf", str(tmp_path / "b.gguf"), one(4, chunk_count=1)]) as merged:
        assert merged.datasets == ("x.txt", "y.txt", "z.txt")
        assert merged.chunk_count == 6
        assert (merged.file_name, merged.sha256, merged.legacy) == (None, None, False)
        merged.write(tmp_path / "c.gguf")
    weights = imatrix_weights(tmp_path / "c.gguf")[EXPERTS].reshape(3, 2)
    np.testing.assert_allclose(weights, np.array([[7 / 6] * 2, [1, 1], [7 / 15] * 2]), rtol=1e-7)
    # over one of its own sources: read before it is replaced
    with merge([tmp_path / "a.gguf", tmp_path / "b.gguf"]) as merged:
        merged.write(tmp_path / "a.gguf")
    with Importance.read(tmp_path / "a.gguf") as read:
        assert read.entries[DENSE].sums.tolist() == [[3.0] * 4]


def test_legacy_files(tmp_path: Path) -> None:
    for name, value in (("a.dat", 1.0), ("b.dat", 3.0)):
        one(value, chunk_count=1, datasets=(name,)).write_dat(tmp_path / name)
    with merge([tmp_path / "a.dat", tmp_path / "b.dat"]) as merged:
        assert merged.legacy
        assert merged.entries[DENSE].counts.tolist() == [1024]
        np.testing.assert_allclose(merged.weights(DENSE), np.full((1, 4), 2 / 7), rtol=1e-6)
    one().write(tmp_path / "c.gguf")
    with pytest.raises(InputError, match=rf"{EXPERTS}: 1 x 6 sums in .*a\.dat, 3 x 2 in .*c\.gguf") as caught:
        merge([tmp_path / "a.dat", tmp_path / "c.gguf"])
    assert ".dat file" in str(caught.value.hint)


def test_refused(tmp_path: Path) -> None:
    fill(one()).write(tmp_path / "filled.gguf")
    cases: list[tuple[list[Importance | Path], str]] = [
        ([one(), tmp_path / "filled.gguf"], r"filled\.gguf is filled \(shrink K=64\)"),
        ([one(), one(chunk_size=256)], r"chunks of 512 tokens, .* of 256"),
        ([one(), Importance.from_arrays({DENSE: ([[1.0]], [1])})], rf"{DENSE}: 1 x 4 sums in .*, 1 x 1 in"),
        ([one(chunk_count=2**32 - 1), one(chunk_count=1)], "more than the file form can state"),
    ]
    for given_, message in cases:
        with pytest.raises(InputError, match=message):
            merge(given_)
    with pytest.raises(UsageError, match="no importance matrix"):
        merge([])
    with pytest.raises(InputError):
        merge([tmp_path / "none.gguf"])
    with pytest.raises(InputError, match="sums are too large"):
        merge([one(1e30), one(1e30)]).write(tmp_path / "huge.gguf")
    assert not (tmp_path / "huge.gguf").exists()


# --- extra tensors and keys ---

IN_SUM, ROUTER = EXPERTS + ".apex_in_sum", "blk.0.apex_router"


def test_extras_are_kept_and_added(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", -3.0)):
        extras = {IN_SUM: np.full((3, 2), value), ROUTER: [value, 2.0]}
        one(extras=extras).write(tmp_path / name)
    with merge([tmp_path / "a", tmp_path / "b"]) as merged:
        assert sorted(merged.extras) == [ROUTER, IN_SUM]
        assert merged.ignored == ()
        merged.write(tmp_path / "c")
    with Importance.read(tmp_path / "c") as read:
        assert read.extras[IN_SUM].values.tolist() == [[-2.0] * 2] * 3
        assert read.extras[ROUTER].values.tolist() == [-2.0, 4.0]
        assert list(read.entries) == [DENSE, EXPERTS]
        assert read.write(tmp_path / "d") == read.sha256
    # another reader sees them beside stock's pairs
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "c").tensors}
    assert tensors[IN_SUM].tolist() == [[-2.0] * 2] * 3
    assert len(tensors) == 6


def test_extras_that_would_not_cover_all_tokens_are_dropped() -> None:
    with_it, without = one(extras={IN_SUM: np.ones((3, 2)), ROUTER: [1.0]}), one()
    merged = merge([with_it, without])
    assert merged.extras == {}
    assert merged.ignored == (ROUTER, IN_SUM)
    elsewhere = Importance.from_arrays({"blk.7.attn_q.weight": ([[1.0]], [1])})
    assert sorted(merge([with_it, elsewhere]).extras) == [ROUTER, IN_SUM]
    with pytest.raises(InputError, match=rf"{ROUTER}: 1 values in .*, 2 in"):
        merge([with_it, one(extras={IN_SUM: np.ones((3, 2)), ROUTER: [1.0, 1.0]})])


def test_extras_that_cannot_be_written(tmp_path: Path) -> None:
    for name in ("blk.0.router", "b" * 60 + ".apex_x"):
        with pytest.raises(InputError, match=r"\.apex_ in their names"):
            one(extras={name: [1.0]}).write(tmp_path / "a")
    with pytest.raises(InputError, match=r"blk\.0\.apex_x: value 1 is not finite"):
        one(extras={"blk.0.apex_x": [1.0, np.nan]})
    assert list(tmp_path.iterdir()) == []


def test_extras_that_are_broken(tmp_path: Path) -> None:
    one(extras={ROUTER: [1.0, 1234.5]}).write(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    at = data.rfind(np.float32(1234.5).tobytes())
    (tmp_path / "a").write_bytes(data[:at] + np.float32(np.inf).tobytes() + data[at + 4 :])
    with pytest.raises(InputError, match=rf"a: {ROUTER}: value 1 is not finite"):
        Importance.read(tmp_path / "a")


def test_keys() -> None:
    common = {"apex.library": Value.string("x")}
    a = one(
        metadata={**common, "apex.tokens": Value.u32(5), "apex.corpus": Value.string("a"), "apex.only": Value.u8(1)}
    )
    b = one(metadata={**common, "apex.tokens": Value.u32(2**32 - 1), "apex.corpus": Value.string("b")})
    merged = merge([a, b]).metadata
    assert {key: value.data for key, value in merged.items()} == {"apex.library": "x", "apex.tokens": 2**32 + 4}
