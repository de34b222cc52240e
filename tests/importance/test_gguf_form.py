"""The GGUF form against PyPI gguf (writer and reader) and the formula of llama-quantize."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from apex_quant.errors import GGUFError, InputError
from apex_quant.gguf import Value
from apex_quant.importance import Importance
from tests.helpers.random_models import write_random_gguf
from tests.helpers.stock import imatrix_weights

EXPERTS = "blk.0.ffn_up_exps.weight"
DENSE = "blk.0.attn_q.weight"
TABLE = {
    EXPERTS: (np.arange(12, dtype=np.float32).reshape(3, 4), np.array([3.0, 0.0, 2.5], np.float32)),
    DENSE: (np.array([[0.1, 0.7, 3.0]], np.float32), np.array([7.0], np.float32)),
}


def write_stock(path: Path, table: dict[str, Any] = TABLE, **change: Any) -> Path:
    """As llama-imatrix writes it, by PyPI gguf. `change` replaces or (None) drops what it names."""
    writer = gguf.GGUFWriter(path, arch="")
    about = {"type": "imatrix", "datasets": ["/data/chat.txt", "b.txt"], "chunk_count": 9, "chunk_size": 512}
    about |= change
    if about["type"] is not None:
        writer.add_string("general.type", about["type"])
    if about["datasets"] is not None:
        writer.add_array("imatrix.datasets", about["datasets"])
    for key in ("chunk_count", "chunk_size"):
        if about[key] is not None:
            writer.add_uint32("imatrix." + key, about[key])
    for name, (sums, counts) in table.items():
        if sums is not None:
            writer.add_tensor(name + ".in_sum2", np.asarray(sums))
        if counts is not None:
            writer.add_tensor(name + ".counts", np.asarray(counts).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_llama_imatrix_writes(tmp_path: Path) -> None:
    path = write_stock(tmp_path / "stock.gguf")
    with Importance.read(path) as importance:
        assert list(importance.entries) == [DENSE, EXPERTS]
        assert importance.datasets == ("/data/chat.txt", "b.txt")
        assert (importance.chunk_count, importance.chunk_size, importance.legacy) == (9, 512, False)
        assert importance.file_name == "stock.gguf"
        assert importance.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        entry = importance.entries[EXPERTS]
        assert entry.counts.tolist() == [3, 0, 3]  # 2.5 is rounded away from zero, as lround does
        np.testing.assert_array_equal(entry.sums, TABLE[EXPERTS][0])
        weights = importance.weights(EXPERTS)
        assert weights.dtype == np.float32
        expected = [[i / np.float32(3) for i in np.arange(4, dtype=np.float32)], [1.0] * 4]
        np.testing.assert_array_equal(weights[:2], np.array(expected, np.float32))
        for name, oracle in imatrix_weights(path).items():
            assert importance.weights(name).tobytes() == oracle.tobytes()
        assert importance.uncovered() == {EXPERTS: [1]}


def test_quantize_metadata_has_names_not_paths(tmp_path: Path) -> None:
    with Importance.read(write_stock(tmp_path / "stock.gguf")) as importance:
        keys = {key: (value.type.name, value.data) for key, value in importance.quantize_metadata().items()}
    assert keys == {
        "quantize.imatrix.file": ("STRING", "stock.gguf"),
        "quantize.imatrix.dataset": ("STRING", "chat.txt"),
        "quantize.imatrix.entries_count": ("UINT32", 2),
        "quantize.imatrix.chunks_count": ("UINT32", 9),
    }
    bare = Importance.from_arrays({DENSE: ([1.0, 2.0], 3)}).quantize_metadata()
    assert set(bare) == {"quantize.imatrix.entries_count"}


def test_written_file_is_stocks_byte_for_byte(tmp_path: Path) -> None:
    """The bytes gguf_write_to_file makes of the calls in IMatrixCollector::save_imatrix, spelled out."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def tensor(name: str, shape: tuple[int, ...], offset: int) -> bytes:
        return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)

    header = b"GGUF" + struct.pack("<IQQ", 3, 4, 4)
    header += text("general.type") + struct.pack("<I", 8) + text("imatrix")
    header += text("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + text("chat.txt")
    header += text("imatrix.chunk_count") + struct.pack("<II", 4, 9)
    header += text("imatrix.chunk_size") + struct.pack("<II", 4, 512)
    header += tensor(DENSE + ".in_sum2", (3,), 0) + tensor(DENSE + ".counts", (1,), 32)
    header += tensor(EXPERTS + ".in_sum2", (4, 3), 64) + tensor(EXPERTS + ".counts", (1, 3), 128)
    data = b"".join(
        np.asarray(part, np.float32).tobytes().ljust(size, b"\0")
        for part, size in (
            (TABLE[DENSE][0], 32),
            ([7], 32),
            (TABLE[EXPERTS][0], 64),
            ([3, 0, 3], 32),
        )
    )
    expected = header.ljust(-(-len(header) // 32) * 32, b"\0") + data
    importance = Importance.from_arrays(
        {EXPERTS: (TABLE[EXPERTS][0], [3, 0, 3]), DENSE: (TABLE[DENSE][0], 7)},
        datasets=("chat.txt",),
        chunk_count=9,
    )
    digest = importance.write(tmp_path / "ours.gguf")
    written = (tmp_path / "ours.gguf").read_bytes()
    assert written == expected
    assert digest == hashlib.sha256(expected).hexdigest()


NAMES = st.from_regex(r"blk\.[0-9]{1,2}\.[a-z_]{1,30}\.weight", fullmatch=True)
SUMS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(0, 2.0**99, width=32),
)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, tuple[Any, Any]]:
    table = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=5, unique=True)):
        sums = draw(SUMS)
        counts = draw(hnp.arrays(np.int64, len(sums), elements=st.integers(0, 1 << 24)))
        table[name] = (sums, counts)
    return table


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), datasets=st.lists(st.text(max_size=20), max_size=3), chunks=st.integers(0, 2**32 - 1))
def test_round_trip(tmp_path: Path, table: dict[str, Any], datasets: list[str], chunks: int) -> None:
    path = tmp_path / "a.gguf"
    made = Importance.from_arrays(
        table,
        datasets=tuple(datasets),
        chunk_count=chunks,
        metadata={"apex.prior": Value.string("x")},
    )
    digest = made.write(path)
    with Importance.read(path) as read:
        assert read.sha256 == digest
        assert list(read.entries) == sorted(table)
        assert (read.datasets, read.chunk_count) == (tuple(datasets), chunks)
        assert {key: value.data for key, value in read.metadata.items()} == {"apex.prior": "x"}
        for name, (sums, counts) in table.items():
            assert read.entries[name].sums.tobytes() == sums.tobytes()
            assert read.entries[name].counts.tolist() == counts.tolist()
            oracle = imatrix_weights(path)[name]
            assert read.for_tensor(_Tensor(name, (sums.shape[1], 1, len(sums)))).tobytes() == oracle.tobytes()  # type: ignore[union-attr]
        assert read.write(tmp_path / "b.gguf") == digest


class _Tensor:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape = name, shape


def _set(name: str, sums: Any = None, counts: Any = None) -> dict[str, Any]:
    table = {key: (value[0].copy(), value[1].copy()) for key, value in TABLE.items()}
    table[name] = (table[name][0] if sums is None else sums, table[name][1] if counts is None else counts)
    return table


def _one_value(name: str, value: float, part: int = 0) -> dict[str, Any]:
    table = {key: (pair[0].copy(), pair[1].copy()) for key, pair in TABLE.items()}
    table[name][part].reshape(-1)[2 if part == 0 else 0] = value
    return table


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: write_stock(p, _one_value(DENSE, float("nan"))), [DENSE, "nan", "channel 2"]),
        (lambda p: write_stock(p, _one_value(EXPERTS, float("inf"))), [EXPERTS, "inf"]),
        (lambda p: write_stock(p, _one_value(EXPERTS, -1.0)), [EXPERTS, "-1.0"]),
        (lambda p: write_stock(p, _one_value(EXPERTS, -1.0, part=1)), [EXPERTS, "count"]),
        (lambda p: write_stock(p, _one_value(EXPERTS, float("nan"), part=1)), [EXPERTS, "count"]),
        (lambda p: write_stock(p, _one_value(EXPERTS, 1e30, part=1)), [EXPERTS, "count"]),
        (lambda p: write_stock(p, _set(DENSE, counts=np.ones(2, np.float32))), [DENSE, "3 sums", "2 rows"]),
        (lambda p: write_stock(p, _set(DENSE, sums=np.ones(3, np.float16))), [DENSE, "F16", "must be F32"]),
        (lambda p: write_stock(p, {DENSE: (TABLE[DENSE][0], None)}), [DENSE + ".counts is missing"]),
        (lambda p: write_stock(p, {DENSE: (None, TABLE[DENSE][1])}), [DENSE + ".in_sum2 is missing"]),
        (lambda p: write_stock(p, {}), ["no importance entries"]),
        (lambda p: write_stock(p, type="model"), ["'model'", "not an importance matrix"]),
        (lambda p: write_stock(p, datasets=None, chunk_size=None), ["imatrix.datasets, imatrix.chunk_size"]),
        (lambda p: write_stock(p, datasets=[1, 2]), ["imatrix.datasets"]),
    ],
)
def test_broken_contents_are_named(tmp_path: Path, make: Callable[[Path], Path], words: list[str]) -> None:
    path = make(tmp_path / "bad.gguf")
    with pytest.raises(InputError) as caught:
        Importance.read(path)
    for word in ["bad.gguf", *words]:
        assert word in str(caught.value)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    whole = write_stock(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    needed = len(whole) - 28  # the last tensor is one count; the rest is padding
    for size in range(0, needed, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            Importance.read(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_give_errors_or_sane_weights(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(write_stock(tmp_path / "whole.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "mutated.gguf"
    path.write_bytes(whole)
    try:
        importance = Importance.read(path)
    except InputError:
        return
    with importance:
        for name in importance.entries:
            weights = importance.weights(name)
            assert np.isfinite(weights).all()
            assert (weights >= 0).all()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(GGUFError, match=path.name):
            Importance.read(path)


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without entries"):
        Importance({}).write(tmp_path / "a.gguf")
    long = "blk.0." + "x" * 60 + ".weight"
    with pytest.raises(InputError, match="longer than"):
        Importance.from_arrays({long: ([1.0], 1)}).write(tmp_path / "a.gguf")
    with pytest.raises(InputError, match="negative"):
        Importance.from_arrays({DENSE: ([1.0], -1)})
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_another_kind_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "extra.gguf"
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_array("imatrix.datasets", ["a"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in (DENSE + ".in_sum2", DENSE + ".counts", "blk.0.other"):
        writer.add_tensor(name, np.ones(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Importance.read(path) as importance:
        assert importance.ignored == ("blk.0.other",)
        assert list(importance.entries) == [DENSE]


def test_files_that_are_no_importance_matrix(tmp_path: Path) -> None:
    huge = tmp_path / "huge.dat"
    with huge.open("wb") as file:
        file.truncate(9 << 30)  # a hole: takes no space
    with pytest.raises(InputError, match="too large"):
        Importance.read(huge)
    model = write_random_gguf(tmp_path / "model.gguf", "qwen3moe", layers="M")
    with pytest.raises(InputError, match=r"model\.gguf: "):
        Importance.read(model)
