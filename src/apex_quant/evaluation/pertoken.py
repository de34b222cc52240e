"""Per-token and per-task numbers beside results.json: a NumPy archive, so that a comparison is possible later.

Arrays are named METRIC/ARRAY. The archive is an ordinary .npz, stored without compression, the same bytes for the
same arrays. It is read without NumPy's loader: no pickles, no array larger than the file.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from apex_quant.errors import InputError, ResourceError
from apex_quant.gguf.atomic import require_space, write_file

Arrays = dict[str, NDArray[Any]]

MAX_BYTES: Final = 1 << 30
"""Of an archive: 30 million scored tokens."""
MAX_ARRAYS: Final = 1000
NEXT: Final = ".next"
"""A complete archive that waits for its results.json: see results.update."""

_DATED = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say, as NumPy writes
_KINDS = "biufU"
_HEADER = re.compile(
    rb"\{'descr': (.{1,200}?), 'fortran_order': (True|False), 'shape': \(((?:\d{1,19}, ?){0,8}(?:\d{1,19})?)\), \} *\n",
    re.DOTALL,
)
_NUMBERS = re.compile(rb"'([<>|][biufU]\d{1,6})'")
_LENGTHS = {b"\x01\x00": "<H", b"\x02\x00": "<I"}
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, EOFError, RuntimeError, OverflowError,
           TypeError, MemoryError, OSError)  # fmt: skip


def write(path: str | Path, arrays: Mapping[str, ArrayLike]) -> str:
    """Replace `path` by an archive of these arrays (numbers, booleans or text), and give its sha256.

    Raises InputError for other kinds of arrays, ResourceError when it cannot be written.
    """
    data = _packed(arrays)
    require_space(path, len(data))
    write_file(path, data)
    return hashlib.sha256(data).hexdigest()


def read(path: str | Path, sha256: str | None = None) -> Arrays:
    """The arrays of an archive. With `sha256`, of the one that has it: this file, or one complete beside it (NEXT).

    Raises InputError when the file is missing, broken, has pickled objects, claims more than it holds, is larger than
    MAX_BYTES, or is not the one with that sha256.
    """
    path = Path(path)
    data = read_bounded(path, MAX_BYTES, "the numbers per token")
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        waiting = path.with_name(path.name + NEXT)
        data = read_bounded(waiting, MAX_BYTES, "the numbers per token") if waiting.exists() else b""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise InputError(
                f"{path}: not the file that results.json names: its sha256 is another one",
                hint="keep the .npz beside the .json of the same run",
            )
    try:
        return _unpacked(data)
    except _BROKEN as error:
        raise InputError(f"{path}: broken archive: {error}") from None


def read_bounded(path: str | Path, limit: int, what: str) -> bytes:
    """All bytes of a regular file of at most `limit` bytes. Raises InputError."""
    try:
        # a pipe or a device must not block or go on for ever
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {what} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    state = os.fstat(fd)
    if not stat.S_ISREG(state.st_mode):
        os.close(fd)
        raise InputError(f"{path}: not a file")
    with os.fdopen(fd, "rb") as file:
        if state.st_size > limit:
            raise InputError(f"{path}: {state.st_size} bytes, at most {limit} are read")
        try:
            return file.read(limit)
        except OSError as error:
            raise ResourceError(f"{path}: cannot be read: {error.strerror}") from None


def hash_chunks(tokens: ArrayLike) -> NDArray[np.uint64]:
    """One hash for the token ids of each chunk, I[chunks, ctx] -> U64 [chunks]: blake2b-8 of little-endian int32."""
    rows = np.ascontiguousarray(tokens, "<i4")
    hashes = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64)


def token_hashes(chunk_hash: ArrayLike, chunk: ArrayLike, position: ArrayLike) -> NDArray[np.uint64]:
    """What identifies a scored token: its chunk's hash xor its position, U64 [n].

    `chunk_hash` U64 [chunks] of whole chunks, `chunk` I[n] the row in it, `position` I[n] in the chunk.
    Raises InputError for a chunk that has no hash.
    """
    hashes, rows = np.asarray(chunk_hash, np.uint64), np.asarray(chunk, np.int64)
    if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < hashes.size:
        raise InputError(f"chunk {int(rows.max())} of {hashes.size}: the numbers per token do not fit together")
    return hashes[rows] ^ np.asarray(position).astype(np.int64).astype(np.uint64)


def metrics(arrays: Mapping[str, Any]) -> list[str]:
    """The metrics that an archive has arrays of."""
    return sorted({name.partition("/")[0] for name in arrays})


def of_metric(arrays: Arrays, metric: str) -> Arrays:
    """The arrays of one metric, without its name."""
    return {name.removeprefix(metric + "/"): array for name, array in arrays.items() if name.startswith(metric + "/")}


def _packed(arrays: Mapping[str, ArrayLike]) -> memoryview:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            array = np.asanyarray(arrays[name])
            if array.dtype.kind not in _KINDS:
                raise InputError(f"{name}: arrays of {array.dtype} are not kept")
            array = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
            entry = zipfile.ZipInfo(name + ".npy", _DATED)
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return buffer.getbuffer()


def _unpacked(data: bytes) -> Arrays:
    """Bounded by what the file holds: every claim is checked before anything is allocated for it."""
    arrays: Arrays = {}
    left = MAX_BYTES
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_ARRAYS:
            raise ValueError(f"{len(entries)} arrays, at most {MAX_ARRAYS} are read")
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            if name in arrays:
                raise ValueError(f"{name!r} is there twice")
            if entry.file_size > left:
                raise ValueError(f"arrays of more than {MAX_BYTES} bytes")
            with archive.open(entry) as file:
                content = file.read(left + 1)  # a header may lie about the size of what is compressed
            left -= len(content)
            if left < 0:
                raise ValueError(f"arrays of more than {MAX_BYTES} bytes")
            arrays[name] = _array(content, name)
    return arrays


def _array(content: bytes, name: str) -> NDArray[Any]:
    """An array from the bytes of a .npy entry. Its header is matched, not evaluated as NumPy's loader does."""
    version = content[6:8]
    if content[:6] != b"\x93NUMPY" or version not in _LENGTHS:
        raise ValueError(f"{name!r}: not an array of version 1 or 2 of the format")
    length = struct.Struct(_LENGTHS[version])
    start = 8 + length.size + length.unpack_from(content, 8)[0]
    found = _HEADER.fullmatch(content[8 + length.size : start])
    if found is None:
        raise ValueError(f"{name!r}: the header of the array is broken")
    kind = _NUMBERS.fullmatch(found[1])
    if kind is None:
        raise ValueError(f"{name!r}: holds {found[1].decode('latin-1')[:50]}, not numbers")
    dtype = np.dtype(kind[1].decode("ascii"))
    shape = [int(side) for side in found[3].split(b",") if side.strip()]
    size = math.prod(shape) * dtype.itemsize
    if dtype.itemsize == 0 or size != len(content) - start:
        raise ValueError(f"{name!r}: claims {size} bytes and has {max(0, len(content) - start)}")
    if dtype.kind == "U" and size:
        # code points beyond Unicode would be an error only when a text is made of them
        points = np.frombuffer(content, dtype.byteorder.replace("|", "=") + "u4", offset=start)
        if int(points.max()) > 0x10FFFF:
            raise ValueError(f"{name!r}: holds no text")
    array = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if found[2] == b"True" else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
