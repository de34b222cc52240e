"""Archives of numbers per token: the same back, readable by NumPy, and hostile ones refused without harm."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from apex_quant.errors import InputError, ResourceError
from apex_quant.evaluation import pertoken
from apex_quant.evaluation.pertoken import hash_chunks, read, token_hashes, write

NUMBERS = (np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64, np.float16, np.float32, np.float64)
KINDS: Any = st.sampled_from([*NUMBERS, np.dtype(">i4"), np.dtype("U3")])
ARRAYS: Any = st.dictionaries(
    st.from_regex(r"[a-z0-9_]{1,8}/[a-z0-9_]{1,8}", fullmatch=True),
    hnp.arrays(KINDS, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)),
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(arrays=ARRAYS)
def test_round_trip(arrays: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("n") / "a.npz"
    sha256 = write(path, arrays)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert write(path, dict(reversed(arrays.items()))) == sha256
    back = read(path, sha256)
    with np.load(path, allow_pickle=False) as stock:
        assert sorted(stock.files) == sorted(arrays)
        for name, array in arrays.items():
            for found in (back[name], stock[name]):
                assert found.shape == array.shape
                assert np.array_equal(found, array, equal_nan=array.dtype.kind == "f")
            assert back[name].dtype == array.dtype.newbyteorder("=")


def test_numpys_own_archives(tmp_path: Path) -> None:
    """np.savez and np.savez_compressed, columns first, and the wider header of version 2."""
    values = np.arange(12, dtype=np.int32).reshape(3, 4)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", allow_pickle=False, **{"kld/kld": values, "b": np.asfortranarray(values)})
        found = read(tmp_path / "a.npz")
        assert np.array_equal(found["kld/kld"], values)
        assert np.array_equal(found["b"], values)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, version=(2, 0))
    _zip(tmp_path / "a.npz", {"c.npy": buffer.getvalue()})
    assert np.array_equal(read(tmp_path / "a.npz")["c"], values)


def _zip(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def _npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def _header(descr: str, shape: str) -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


HOSTILE = {
    "pickled": (_npy(_header("'|O'", "(1,)"), pickle.dumps([1])), "not numbers"),
    "bare pickle": (pickle.dumps([1]), "not an array"),
    "record": (_npy(_header("[('a', '<i4')]", "(1,)"), b"1234"), "not numbers"),
    "huge": (_npy(_header("'<f8'", "(1099511627776, 1048576)"), b"12345678"), r"claims \d+ bytes and has 8"),
    "huger": (_npy(_header("'<f8'", f"({10**30},)"), b"12345678"), "header of the array"),
    "most": (_npy(_header("'<f8'", f"({', '.join(['9' * 19] * 8)})"), b"12345678"), "claims"),
    "nothing of much": (_npy(_header("'<f8'", "(0, 9999999999999999999)")), "broken archive"),
    "slow": (_npy(_header("'<f8'", "(" + "1" * 5000 + "x)")), "header of the array"),
    "short": (_npy(_header("'<i4'", "(4,)"), b"123"), "claims 16 bytes and has 3"),
    "long": (_npy(_header("'<i4'", "(0,)"), b"123"), "claims 0 bytes and has 3"),
    "negative": (_npy(_header("'<i4'", "(-1,)"), b"1234"), "header of the array"),
    "twice negative": (_npy(_header("'<i4'", "(-1, -1)"), b"1234"), "header of the array"),
    "no size": (_npy(_header("'<U0'", "(1000000000000,)")), "claims 0 bytes"),
    "strings": (_npy(_header("'|S4'", "(1,)"), b"1234"), "not numbers"),
    "dates": (_npy(_header("'<M8[s]'", "(1,)"), b"12345678"), "not numbers"),
    "no text": (_npy(_header("'<U1'", "(1,)"), b"\xff\xff\xff\xff"), "no text"),
    "code": (_npy("__import__('os').abort()"), "broken archive"),
    "no dict": (_npy("[1]"), "broken archive"),
    "unbalanced": (_npy("(" * 3000), "broken archive"),
    "version": (_npy(_header("'<i4'", "(1,)"), b"1234", b"\x09\x00"), "version"),
    "empty": (b"", "broken archive"),
    "magic only": (b"\x93NUMPY\x01\x00\xff\xff", "broken archive"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_hostile_arrays(name: str, method: int, tmp_path: Path) -> None:
    data, says = HOSTILE[name]
    path = _zip(tmp_path / "a.npz", {"kld/kld.npy": data}, method)
    with pytest.raises(InputError, match=says) as caught:
        read(path)
    assert str(path) in caught.value.message


def test_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    sha256 = write(path, {"a/b": np.arange(3), "a/c": np.array(["x"])})
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(InputError):
            read(path)
    path.write_bytes(data)
    assert len(read(path, sha256)) == 2


def test_every_byte_changed(tmp_path: Path) -> None:
    """Any answer but another error or a crash; with its sha256 always an InputError."""
    path = tmp_path / "a.npz"
    sha256 = write(path, {"a/b": np.arange(3, dtype=np.int32)})
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        with contextlib.suppress(InputError):
            read(path)
        with pytest.raises(InputError, match="sha256"):
            read(path, sha256)


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed zeros, many of them, and more entries than any archive has."""
    monkeypatch.setattr(pertoken, "MAX_BYTES", 1 << 20)
    bomb = _npy(_header("'|u1'", "(8388608,)"), bytes(1 << 23))
    with pytest.raises(InputError, match="more than 1048576 bytes"):
        read(_zip(tmp_path / "a.npz", {"a.npy": bomb}, zipfile.ZIP_DEFLATED))
    one = _npy(_header("'|u1'", "(524288,)"), bytes(1 << 19))
    with pytest.raises(InputError, match="more than 1048576 bytes"):
        read(_zip(tmp_path / "b.npz", {f"{i}.npy": one for i in range(9)}, zipfile.ZIP_DEFLATED))
    # the directory claims little, the data is much
    path = _zip(tmp_path / "c.npz", {"a.npy": bomb}, zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        struct.pack_into("<I", data, data.index(mark) + at, 100)
    path.write_bytes(data)
    with pytest.raises(InputError):
        read(path)
    monkeypatch.setattr(pertoken, "MAX_ARRAYS", 3)
    with pytest.raises(InputError, match="4 arrays, at most 3"):
        read(_zip(tmp_path / "d.npz", {f"{i}.npy": b"" for i in range(4)}))
    (tmp_path / "e.npz").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(InputError, match="at most 1048576 are read"):
        read(tmp_path / "e.npz")


def test_odd_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    good = _npy(_header("'|u1'", "(1,)"), b"1")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", good)
    with pytest.raises(InputError, match="'a' is there twice"):
        read(path)
    data = bytearray(_zip(path, {"a.npy": good}).read_bytes())
    for mark, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        data[data.index(mark) + at] |= 1  # encrypted
    path.write_bytes(data)
    with pytest.raises(InputError, match="broken archive"):
        read(path)
    data = bytearray(_zip(path, {"a.npy": good}).read_bytes())
    for mark, at in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        data[data.index(mark) + at] = 77  # a method nobody has
    path.write_bytes(data)
    with pytest.raises(InputError, match="broken archive"):
        read(path)


def test_not_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "none.npz")
    with pytest.raises(InputError, match="not a file"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a file"):
        read(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a file"):
        read("/dev/zero")
    with pytest.raises(InputError):
        read("a\0b")


def test_refused_to_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="arrays of object"):
        write(tmp_path / "a.npz", {"a": np.array([[1], None], dtype=object)})
    with pytest.raises(ResourceError):
        write(tmp_path / "none" / "a.npz", {"a": np.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_complete_archive_that_waits(tmp_path: Path) -> None:
    """After a kill between results.json and the archive's rename, the one that results.json names is read."""
    old, new = write(tmp_path / "a.npz", {"a": np.zeros(1)}), write(tmp_path / "a.npz.next", {"a": np.ones(1)})
    assert read(tmp_path / "a.npz", old)["a"] == [0]
    assert read(tmp_path / "a.npz", new)["a"] == [1]
    with pytest.raises(InputError, match="its sha256 is another one"):
        read(tmp_path / "a.npz", "0" * 64)


def test_token_hashes() -> None:
    ids = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 5]], np.int32)
    hashes = hash_chunks(ids)
    assert hashes.dtype == np.uint64
    by_hand = [hashlib.blake2b(struct.pack("<4i", *row), digest_size=8).digest() for row in ids.tolist()]
    assert hashes.tolist() == [int.from_bytes(one, "little") for one in by_hand]
    assert hashes[0] == hashes[1] != hashes[2]
    assert np.array_equal(hash_chunks(ids.astype(">i8")), hashes)
    found = token_hashes(hashes, np.array([0, 1, 2, 2]), np.array([2, 2, 2, 3], np.int32))
    assert found[0] == found[1] != found[2]
    assert len(set(found.tolist())) == 3
    assert found[3] == hashes[2] ^ np.uint64(3)
    for chunk in ([3], [-1]):
        with pytest.raises(InputError, match="do not fit together"):
            token_hashes(hashes, np.array(chunk), np.array([0]))
    assert token_hashes(hashes, np.array([], int), np.array([], int)).size == 0


def test_names() -> None:
    arrays = {"kld/kld": np.zeros(1), "kld/top1": np.ones(1), "kld2/kld": np.ones(1)}
    assert pertoken.metrics(arrays) == ["kld", "kld2"]
    assert list(pertoken.of_metric(arrays, "kld")) == ["kld", "top1"]
