"""The legacy form against literal bytes and the formulas of llama-imatrix and llama-quantize."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apex_quant.errors import InputError
from apex_quant.importance import Importance
from tests.helpers.stock import imatrix_weights

UP, DOWN = "blk.0.ffn_up.weight", "blk.0.ffn_down_exps.weight"


def entry(name: str, ncall: int, values: list[float]) -> bytes:
    head = struct.pack("<i", len(name.encode())) + name.encode()
    return head + struct.pack(f"<ii{len(values)}f", ncall, len(values), *values)


ENTRIES = entry(DOWN, 4, [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]) + entry(UP, 0, [0.25, 0.5])
BODY = struct.pack("<i", 2) + ENTRIES
WHOLE = BODY + struct.pack("<ii", 7, 6) + b"a/b.cd"


class Tensor:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape


def read(path: Path, data: bytes) -> Importance:
    path.write_bytes(data)
    return Importance.read(path)


def test_reads_the_literal_form(tmp_path: Path) -> None:
    path = tmp_path / "a.dat"
    with read(path, WHOLE) as importance:
        assert importance.legacy
        assert importance.chunk_count == 7
        assert importance.datasets == ("a/b.cd",)
        np.testing.assert_array_equal(importance.weights(DOWN), [[0.25, 0.5, 0.75, 1, 1, 1]])
        np.testing.assert_array_equal(importance.weights(UP), [[0.25, 0.5]])  # no calls: values as they are
        down = Tensor(DOWN, (3, 5, 2))
        np.testing.assert_array_equal(importance.for_tensor(down), [[0.25, 0.5, 0.75], [1, 1, 1]])
        assert importance.uncovered() == {}
        assert importance.experts_without_data(down) == [1]
        assert importance.experts_without_data(Tensor(UP, (2, 9))) == []
        keys = {key: value.data for key, value in importance.quantize_metadata().items()}
        assert keys == {
            "quantize.imatrix.file": "a.dat",
            "quantize.imatrix.dataset": "b.cd",
            "quantize.imatrix.entries_count": 2,
            "quantize.imatrix.chunks_count": 7,
        }


def test_the_tail_is_optional(tmp_path: Path) -> None:
    for tail, chunks in ((b"", 0), (struct.pack("<i", 5), 5), (struct.pack("<ii", 5, 0), 5)):
        with read(tmp_path / "a.dat", BODY + tail) as importance:
            assert (importance.chunk_count, importance.datasets) == (chunks, ())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ncall=st.integers(0, 2**31 - 1),
    values=st.lists(st.floats(0, 2.0**80, width=32), min_size=1, max_size=20),
)
def test_weights_keep_every_bit(tmp_path: Path, ncall: int, values: list[float]) -> None:
    path = tmp_path / "a.dat"
    with read(path, struct.pack("<i", 1) + entry(UP, ncall, values)) as importance:
        assert importance.weights(UP).tobytes() == imatrix_weights(path)[UP].tobytes()
        importance.write(tmp_path / "a.gguf")  # and so does conversion to GGUF
        with Importance.read(tmp_path / "a.gguf") as converted:
            assert converted.weights(UP).tobytes() == importance.weights(UP).tobytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_written_as_llama_imatrix_does(tmp_path: Path, data: st.DataObject) -> None:
    """save_imatrix_legacy, value by value: mean * ceil(max count / chunk), mean 1 where the count is 0."""
    n_mat, n_in = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    counts = data.draw(st.lists(st.integers(0, 5000), min_size=n_mat, max_size=n_mat))
    value = st.floats(0, 2.0**66, width=32)
    sums = data.draw(st.lists(st.lists(value, min_size=n_in, max_size=n_in), min_size=n_mat, max_size=n_mat))
    chunk = data.draw(st.sampled_from([1, 128, 512]))
    importance = Importance.from_arrays(
        {"z.weight": (sums, counts), "a.weight": ([3.0], 2), "empty.weight": ([1.0], 0)},
        datasets=("x", "last.txt"),
        chunk_count=11,
        chunk_size=chunk,
    )
    path = tmp_path / "a.dat"
    importance.write_dat(path)

    ncall = (max(counts) + chunk - 1) // chunk
    expected = []
    for row, count in zip(sums, counts, strict=True):
        for x in row:
            mean = np.float32(x) / np.float32(count) if count else np.float32(1)
            expected.append(float(mean * np.float32(ncall)))
    stored = [entry("a.weight", (2 + chunk - 1) // chunk, [1.5 * ((2 + chunk - 1) // chunk)])]
    if max(counts):
        stored.append(entry("z.weight", ncall, expected))
    tail = struct.pack("<ii", 11, 8) + b"last.txt"
    assert path.read_bytes() == struct.pack("<i", len(stored)) + b"".join(stored) + tail
    with Importance.read(path) as back:
        for name in back.entries:
            np.testing.assert_allclose(back.weights(name).reshape(-1), importance.weights(name).reshape(-1), rtol=3e-7)


def test_every_truncation_is_an_error_or_lacks_only_the_tail(tmp_path: Path) -> None:
    whole_at = {len(BODY): (), len(BODY) + 4: (), len(WHOLE): ("a/b.cd",)}
    for size in range(len(WHOLE) + 1):
        if size in whole_at:
            with read(tmp_path / "cut.dat", WHOLE[:size]) as importance:
                assert importance.datasets == whole_at[size]
        else:
            with pytest.raises(InputError):
                read(tmp_path / "cut.dat", WHOLE[:size])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (struct.pack("<i", 0), ["number of entries is 0"]),
        (struct.pack("<i", 2**31 - 1) + b"\0" * 100, ["number of entries", "at byte 0"]),
        (struct.pack("<i", -1) + b"\0" * 100, ["number of entries"]),
        (struct.pack("<ii", 1, 2**31 - 1) + b"\0" * 100, ["length of name of entry 0", "at byte 4"]),
        (struct.pack("<ii", 1, -5) + b"\0" * 100, ["length of name"]),
        (struct.pack("<ii", 1, 2) + b"\xff\xfe" + b"\0" * 100, ["not UTF-8"]),
        (struct.pack("<ii", 1, 2) + b"a\0" + b"\0" * 100, ["control characters"]),
        (struct.pack("<i", 1) + entry("w", -1, [1.0]), ["w: number of calls is -1"]),
        (struct.pack("<i", 1) + entry("w", 1, []), ["w: number of values is 0"]),
        (struct.pack("<ii1sii", 1, 1, b"w", 1, 2**31 - 1), ["w: 2147483647 values"]),
        (struct.pack("<i", 1) + entry("w", 1, [float("nan")]), ["w: sum nan of channel 0"]),
        (struct.pack("<i", 1) + entry("w", 1, [1.0, -2.0]), ["channel 1", "not a number from 0"]),
        (struct.pack("<i", 1) + entry("w", 1, [3e38]), ["w: sum inf"]),
        (struct.pack("<i", 1) + entry("w", 1, [3e30]), ["w: sum 1.5"]),
        (struct.pack("<i", 2) + entry("w", 1, [1.0]) * 2, ["a second entry"]),
        (WHOLE + b"x", ["1 bytes after the end"]),
        (b"GGU", ["bad.dat"]),
        (b"", ["0 left"]),
    ],
)
def test_attacks_are_named(tmp_path: Path, data: bytes, words: list[str]) -> None:
    path = tmp_path / "bad.dat"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        Importance.read(path)
    for word in ["bad.dat", *words]:
        assert word in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=200))
def test_noise(tmp_path: Path, noise: bytes) -> None:
    try:
        importance: Any = read(tmp_path / "noise.dat", noise)
    except InputError:
        return
    importance.close()


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without data"):
        Importance.from_arrays({UP: ([1.0], 0)}).write_dat(tmp_path / "a.dat")
    assert list(tmp_path.iterdir()) == []
