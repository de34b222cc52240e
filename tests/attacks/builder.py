"""Hostile GGUF files by name, their bytes spelled out.

Each entry says what the reader must complain about, or None where the oddity is legal. Files that need
more than their own bytes (shards, fifos, folders, holes) are made by the functions at the end.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

U8, BOOL, STRING, ARRAY, U64 = 0, 7, 8, 9, 10
U16, U32, I32 = 2, 4, 5
F32, Q4_K, Q8_0 = 0, 12, 8
HUGE = 1 << 62


def u16(n: int) -> bytes:
    return struct.pack("<H", n)


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(raw: bytes) -> bytes:
    """A GGUF string."""
    return u64(len(raw)) + raw


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    """A metadata entry."""
    return text(key) + u32(kind) + value


def row(name: bytes, dims: tuple[int, ...], kind: int = F32, offset: int = 0) -> bytes:
    """A row of the tensor table."""
    return text(name) + u32(len(dims)) + b"".join(u64(n) for n in dims) + u32(kind) + u64(offset)


ARCH = pair(b"general.architecture", STRING, text(b"llama"))


def gguf(*parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3, data: int = 0, align: int = 32) -> bytes:
    """Magic, version, the counts as claimed, the parts, and `data` bytes of data section."""
    header = b"GGUF" + u32(version) + u64(tensors) + u64(keys) + b"".join(parts)
    return header.ljust(-(-len(header) // align) * align, b"\0") + b"\x11" * data if data else header


@dataclass(frozen=True)
class Attack:
    """A file and what must be said about it; `says` None: it is legal and must open."""

    data: bytes
    says: str | None
    field: str | None = None
    size: int | None = None  # grown to this size by a hole


def one(kind: int, value: bytes, says: str | None, key: bytes = b"k") -> Attack:
    """A file with one metadata entry."""
    return Attack(gguf(pair(key, kind, value), keys=1), says, key.decode() if says else None)


def tensor(*rows: bytes, says: str | None, field: str | None = None, data: int = 64, keys: bytes = b"") -> Attack:
    """A file with a tensor table."""
    return Attack(gguf(keys, *rows, keys=1 if keys else 0, tensors=len(rows), data=data), says, field)


def alignment(n: int) -> bytes:
    return pair(b"general.alignment", U32, u32(n))


A = (32,)  # one row of 32 weights: 128 bytes in F32, 34 in Q8_0

ATTACKS: dict[str, Attack] = {
    # the first 24 bytes
    "empty": Attack(b"", "0 bytes is no GGUF"),
    "one byte": Attack(b"G", "1 bytes is no GGUF"),
    "magic only": Attack(b"GGUF", "4 bytes is no GGUF"),
    "wrong magic": Attack(b"GGML" + u32(3) + u64(0) * 2, "starts with b'GGML'", "magic"),
    "zip": Attack(b"PK\3\4" + b"\0" * 60, "no GGUF file", "magic"),
    "zeros": Attack(b"\0" * 4096, "no GGUF file", "magic"),
    "version 0": Attack(gguf(version=0), "version 0", "version"),
    "version 1": Attack(gguf(version=1), "version 1", "version"),
    "version 4": Attack(gguf(version=4), "version 4", "version"),
    "version 2^32-1": Attack(gguf(version=2**32 - 1), "version 4294967295", "version"),
    "big-endian": Attack(b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + b"\0" * 64, "big-endian", "version"),
    "version 2": Attack(gguf(ARCH, row(b"a", A), keys=1, tensors=1, version=2, data=128), None),
    "nothing inside": Attack(gguf(), None),
    "2^62 tensors": Attack(gguf(tensors=HUGE), "tensors", "tensor count"),
    "2^64-1 tensors": Attack(gguf(tensors=2**64 - 1), "tensors", "tensor count"),
    "2^62 keys": Attack(gguf(keys=HUGE), "keys", "key count"),
    "2^64-1 keys": Attack(gguf(keys=2**64 - 1), "keys", "key count"),
    "one key too many": Attack(gguf(ARCH, keys=2), "ends at", "key 1"),
    "one tensor too many": Attack(gguf(row(b"a", A), tensors=2), "cut off", "tensor 1"),
    # keys
    "empty key": Attack(gguf(pair(b"", U8, b"\1"), keys=1), "0 bytes", "key 0"),
    "key of 2^62 bytes": Attack(gguf(u64(HUGE) + b"k", keys=1), "bytes", "key 0"),
    "key of 2^64-1 bytes": Attack(gguf(u64(2**64 - 1) + b"k", keys=1), "bytes", "key 0"),
    "key of 256 bytes": Attack(gguf(pair(b"k" * 256, U8, b"\1"), keys=1), "256 bytes", "key 0"),
    "key of 255 bytes": Attack(gguf(pair(b"k" * 255, U8, b"\1"), keys=1), None),
    "key not UTF-8": Attack(gguf(pair(b"\xff\xfe", U8, b"\1"), keys=1), "not UTF-8", "key 0"),
    "key with a lone surrogate": Attack(gguf(pair(b"\xed\xa0\x80", U8, b"\1"), keys=1), "not UTF-8", "key 0"),
    "key with overlong slash": Attack(gguf(pair(b"\xc0\xaf", U8, b"\1"), keys=1), "not UTF-8", "key 0"),
    "key with escape": Attack(gguf(pair(b"\x1b[2J", U8, b"\1"), keys=1), "control", "key 0"),
    "key with null": Attack(gguf(pair(b"a\0b", U8, b"\1"), keys=1), "control", "key 0"),
    "key twice": Attack(gguf(ARCH, ARCH, keys=2), "twice", "key 1"),
    "key beyond ASCII": Attack(gguf(pair("ключ".encode(), U8, b"\1"), keys=1), None),
    # values
    "value type 13": one(13, b"\0" * 8, "unknown value type 13"),
    "value type 2^32-1": one(2**32 - 1, b"\0" * 8, "unknown value type"),
    "no value": one(U64, b"", "ends at"),
    "half a value": one(U64, b"\0" * 7, "ends at"),
    "bool of 2": one(BOOL, b"\2", "bool of 2"),
    "bool of 1": one(BOOL, b"\1", None),
    "string of 2^62": one(STRING, u64(HUGE) + b"x", "ends at"),
    "string of 2^64-1": one(STRING, u64(2**64 - 1) + b"x", "ends at"),
    "string one byte short": one(STRING, u64(4) + b"abc", "ends at"),
    "string not UTF-8": one(STRING, text(b"\xff\xc3("), None),
    "empty string": one(STRING, text(b""), None),
    "array of nothing known": one(ARRAY, u32(77) + u64(1) + b"\0" * 8, "unknown value type 77"),
    "array of arrays": one(ARRAY, u32(ARRAY) + u64(1) + u32(U8) + u64(1) + b"\0", "array of arrays"),
    "2^62 arrays of arrays": one(ARRAY, u32(ARRAY) + u64(HUGE), "array of arrays"),
    "2^62 bytes": one(ARRAY, u32(U8) + u64(HUGE), "ends at"),
    "2^62 numbers": one(ARRAY, u32(U64) + u64(HUGE), "ends at"),
    "2^61 numbers, 2^64 bytes": one(ARRAY, u32(U64) + u64(1 << 61), "ends at"),
    "2^64-1 numbers": one(ARRAY, u32(U32) + u64(2**64 - 1), "ends at"),
    "2^62 strings": one(ARRAY, u32(STRING) + u64(HUGE), "strings"),
    "2^20 strings in no bytes": one(ARRAY, u32(STRING) + u64(1 << 20), "ends at"),
    "strings, the last too long": one(ARRAY, u32(STRING) + u64(2) + text(b"a") + u64(9) + b"b", "ends at"),
    "strings, the first of 2^63": one(ARRAY, u32(STRING) + u64(2) + u64(1 << 63) + text(b"b"), "ends at"),
    "bools with a 2": one(ARRAY, u32(BOOL) + u64(3) + b"\0\1\2", "bool of 2"),
    "array of none": one(ARRAY, u32(U64) + u64(0), None),
    "array without count": one(ARRAY, u32(U8) + b"\0\0", "ends at"),
    "architecture is a number": one(U32, u32(7), "must be a string", b"general.architecture"),
    # alignment
    "alignment 0": one(U32, u32(0), "power of two", b"general.alignment"),
    "alignment 3": one(U32, u32(3), "power of two", b"general.alignment"),
    "alignment 2^31": one(U32, u32(1 << 31), "power of two", b"general.alignment"),
    "alignment 2^32-1": one(U32, u32(2**32 - 1), "power of two", b"general.alignment"),
    "alignment a u64": one(U64, u64(32), "UINT32", b"general.alignment"),
    "alignment a string": one(STRING, text(b"32"), "UINT32", b"general.alignment"),
    "alignment an array": one(ARRAY, u32(U32) + u64(1) + u32(32), "UINT32", b"general.alignment"),
    "alignment 64": Attack(gguf(alignment(64), row(b"a", A), keys=1, tensors=1, data=128, align=64), None),
    # tensor names
    "name empty": tensor(row(b"", A), says="0 bytes", field="tensor 0"),
    "name of 64 bytes": tensor(row(b"n" * 64, A), says="64 bytes", field="tensor 0"),
    "name of 63 bytes": tensor(row(b"n" * 63, A), says=None, data=128),
    "name of 2^62 bytes": tensor(u64(HUGE), says="bytes", field="tensor 0"),
    "name not UTF-8": tensor(row(b"\x80", A), says="not UTF-8", field="tensor 0"),
    "name with newline": tensor(row(b"a\nb", A), says="control", field="tensor 0"),
    "name twice": tensor(row(b"a", A), row(b"a", A, offset=128), says="twice", field="tensor 1", data=256),
    # tensor shapes
    "5 dimensions": tensor(row(b"a", (1,) * 5), says="5 dimensions", field="a"),
    "2^32-1 dimensions": tensor(text(b"a") + u32(2**32 - 1), says="dimensions", field="a", data=128),
    "no dimensions": tensor(row(b"a", ()), says=None),
    "4 dimensions": tensor(row(b"a", (2, 2, 2, 2)), says=None),
    "a dimension of 0": tensor(row(b"a", (32, 0)), says="dimension of 0", field="a"),
    "a dimension of -1": tensor(row(b"a", (32, 2**64 - 1)), says="dimension of -1", field="a"),
    "2^63 rows": tensor(row(b"a", (1, 1 << 63)), says="dimension of -", field="a"),
    "product wraps to 0": tensor(row(b"a", (1 << 32, 1 << 32)), says="weights, at most", field="a"),
    "product wraps to 16": tensor(row(b"a", ((1 << 62) + 4, 4)), says="weights, at most", field="a"),
    "product of 2^248": tensor(row(b"a", (HUGE,) * 4), says="weights, at most", field="a"),
    "2^62 weights": tensor(row(b"a", (HUGE,)), says="beyond the end", field="a"),
    "row no multiple of 256": tensor(row(b"a", (128, 2), Q4_K), says="multiple of Q4_K", field="a"),
    "row no multiple of 32": tensor(row(b"a", (33,), Q8_0), says="multiple of Q8_0", field="a"),
    # tensor types
    "type 4, retired": tensor(row(b"a", A, 4), says="tensor type 4", field="a"),
    "type 31, retired": tensor(row(b"a", A, 31), says="tensor type 31", field="a"),
    "type 99": tensor(row(b"a", A, 99), says="tensor type 99", field="a"),
    "type -1": tensor(row(b"a", A, 2**32 - 1), says="tensor type 4294967295", field="a"),
    # tensor data
    "table cut off": tensor(row(b"a", A)[:-1], says="cut off", field="tensor 0", data=0),
    "no data": tensor(row(b"a", A), says="beyond the end", field="a", data=0),
    "last byte missing": tensor(row(b"a", A), says="beyond the end", field="a", data=127),
    "to the last byte": tensor(row(b"a", A), says=None, data=128),
    "bytes after the data": tensor(row(b"a", A), says=None, data=999),
    "offset not aligned": tensor(row(b"a", A, offset=4), says="not aligned", field="a", data=256),
    "offset 2^62": tensor(row(b"a", A, offset=HUGE), says="beyond the end", field="a"),
    "offset 2^64-32": tensor(row(b"a", A, offset=2**64 - 32), says="beyond the end", field="a"),
    "same data twice": tensor(row(b"a", A), row(b"b", A), says="overlaps that of a", field="b", data=256),
    "overlap by a block": tensor(row(b"a", A), row(b"b", A, offset=96), says="overlaps that of a", field="b", data=256),
    "overlap, later one first": tensor(
        row(b"a", A, offset=96), row(b"b", A), says="overlaps that of b", field="a", data=256
    ),
    "a small one inside": tensor(
        row(b"a", (64,)), row(b"b", (1,), offset=128), says="overlaps that of a", field="b", data=256
    ),
    "later one first": tensor(row(b"a", A, offset=128), row(b"b", A), says=None, data=256),
    "gap between tensors": tensor(row(b"a", A), row(b"b", A, offset=512), says=None, data=640),
    # shards of one
    "17 shards, no name": Attack(
        gguf(pair(b"split.count", U16, u16(17)), pair(b"split.no", U16, u16(0)), keys=2), "name", "split.no"
    ),
    "600 shards": one(U16, u16(600), "at most", b"split.count"),
    "shard count a string": one(STRING, text(b"2"), "must be a count", b"split.count"),
    "shard count -1": one(I32, u32(2**32 - 1), "must be a count", b"split.count"),
    "merged by llama-gguf-split": one(U16, u16(0), None, b"split.count"),
    # huge files of holes
    "4 TB of nothing": Attack(b"", "no GGUF file", "magic", size=1 << 42),
    "4 TB and a magic": Attack(gguf(keys=1), "0 bytes", "key 0", size=1 << 42),
    "4 TB of string": Attack(gguf(pair(b"k", STRING, u64(1 << 41)), keys=1), "most that is read", "k", size=1 << 42),
    "4 TB of array": Attack(
        gguf(pair(b"k", ARRAY, u32(U64) + u64(1 << 38)), keys=1), "most that is read", "k", size=1 << 42
    ),
    "4 TB of empty strings": Attack(
        gguf(pair(b"k", ARRAY, u32(STRING) + u64(1 << 38)), keys=1), "strings", "k", size=1 << 42
    ),
    "4 TB tensor": Attack(gguf(row(b"a", (1 << 39,)), tensors=1), None, size=1 << 42),
}


def write(attack: Attack, path: Path) -> Path:
    """Writes the file; its `size` by a hole, which takes no space."""
    path.write_bytes(attack.data)
    if attack.size is not None:
        os.truncate(path, attack.size)
    return path


def shard(number: int, count: int, name: bytes, total: int = 2, *, keys: bytes = b"", n_keys: int = 0) -> bytes:
    """A correct shard with one tensor."""
    return gguf(
        pair(b"split.no", U16, u16(number)),
        pair(b"split.count", U16, u16(count)),
        pair(b"split.tensors.count", I32, u32(total)),
        keys,
        row(name, A),
        keys=3 + n_keys,
        tensors=1,
        data=128,
    )


S1, S2 = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"
# name -> (files, the one opened, complaint)
SHARDS: dict[str, tuple[dict[str, bytes], str, str | None]] = {
    "two shards": ({S1: shard(0, 2, b"a"), S2: shard(1, 2, b"b")}, S2, None),
    "second missing": ({S1: shard(0, 2, b"a")}, S1, "m-00002-of-00002.gguf"),
    "first missing": ({S2: shard(1, 2, b"b")}, S2, "m-00001-of-00002.gguf"),
    "counts differ": ({S1: shard(0, 2, b"a"), S2: shard(1, 3, b"b")}, S1, "split.count"),
    "numbers equal": ({S1: shard(0, 2, b"a"), S2: shard(0, 2, b"b")}, S1, "split.no"),
    "totals differ": ({S1: shard(0, 2, b"a"), S2: shard(1, 2, b"b", 9)}, S1, "split.tensors.count"),
    "total wrong": ({S1: shard(0, 2, b"a", 3), S2: shard(1, 2, b"b", 3)}, S1, "3 tensors, the shards hold 2"),
    "tensor in both": ({S1: shard(0, 2, b"a"), S2: shard(1, 2, b"a")}, S1, "earlier shard"),
    "names swapped": ({S1: shard(1, 2, b"a"), S2: shard(0, 2, b"b")}, S1, "name"),
    "renamed": ({"model.gguf": shard(0, 2, b"a"), S2: shard(1, 2, b"b")}, "model.gguf", "name"),
    "second is empty": ({S1: shard(0, 2, b"a"), S2: b""}, S1, "no GGUF"),
    "second has no keys": ({S1: shard(0, 2, b"a"), S2: gguf()}, S1, "split.no"),
    "name without keys": ({S1: gguf(ARCH, keys=1)}, S1, "split.count"),
    "number beyond count": ({S1: shard(2, 2, b"a"), S2: shard(1, 2, b"b")}, S1, "name"),
}


def _folder(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _missing(path: Path) -> None:
    """Makes nothing."""


# what is no regular file at all
THINGS: dict[str, Callable[[Path], None]] = {
    "folder": _folder,
    "fifo": _fifo,
    "dangling link": _dangling,
    "link to itself": _loop,
    "/dev/zero": _zero,
    "nothing there": _missing,
}
