"""Importance matrices in the legacy .dat form of llama-imatrix.

Little-endian: i32 entries; per entry i32 length and name, i32 ncall, i32 nval, nval float32; then, if the
file goes on, i32 chunks and i32 length and name of the dataset. A value is mean square times ncall; token
counts and the number of experts are not stored. Read as llama-imatrix does when it merges such files: sums
and counts times the chunk size of 512, a power of two, so that sum / count keeps every bit of value / ncall.
"""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

import numpy as np

from apex_quant.errors import InputError
from apex_quant.gguf.header import open_regular
from apex_quant.importance.hashed import hashed_file
from apex_quant.importance.imatrix import DEFAULT_CHUNK_SIZE, F32, Entry, Importance

MAX_ENTRIES = 1 << 17
MAX_NAME = 1024
_MIN_ENTRY = 4 + 1 + 4 + 4 + 4
_NOT_ONE = "is it an importance matrix at all?"


@dataclass
class _Cursor:
    """Bounded reads forward through a file; every failure names the byte and the field."""

    path: Path
    file: FileIO
    size: int
    at: int = 0

    def take(self, n: int, what: str) -> bytes:
        if n > self.size - self.at:
            raise self.error(f"{what}: {n} bytes expected, {self.size - self.at} left")
        data = os.pread(self.file.fileno(), n, self.at)
        if len(data) != n:
            raise self.error(f"{what}: the file shrank while it was read")
        self.at += n
        return data

    def number(self, what: str, low: int, high: int) -> int:
        value = int(struct.unpack("<i", self.take(4, what))[0])
        if not low <= value <= high:
            self.at -= 4
            raise self.error(f"{what} is {value}, must be {low} to {high}")
        return value

    def text(self, what: str, low: int) -> str:
        data = self.take(self.number(f"length of {what}", low, MAX_NAME), what)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error
        if not text.isprintable():
            raise self.error(f"{what} holds control characters: {text!r}")
        return text

    def error(self, message: str) -> InputError:
        return InputError(f"{self.path} at byte {self.at}: {message}", hint=_NOT_ONE)


def read(path: Path) -> Importance:
    """Read the structure; the values are left to be read. Raises InputError."""
    i32 = (1 << 31) - 1
    with ExitStack() as files:
        fd, size = open_regular(str(path))
        file = files.enter_context(FileIO(fd))
        cursor = _Cursor(path, file, size)
        most = min(MAX_ENTRIES, cursor.size // _MIN_ENTRY)
        entries: dict[str, Entry] = {}
        for i in range(cursor.number("number of entries", 1, max(most, 1))):
            name = cursor.text(f"name of entry {i}", 1)
            if name in entries:
                raise cursor.error(f"{name}: a second entry of that name")
            ncall = cursor.number(f"{name}: number of calls", 0, i32)
            nval = cursor.number(f"{name}: number of values", 1, i32)
            if nval * 4 > cursor.size - cursor.at:
                raise cursor.error(f"{name}: {nval} values, but only {cursor.size - cursor.at} bytes left")
            # with ncall 0 stock takes the values as they are, which is what one call gives
            counts = np.array([max(ncall, 1) * DEFAULT_CHUNK_SIZE], dtype=np.int64)
            entries[name] = Entry(counts, nval, partial(_values, path, file, cursor.at, DEFAULT_CHUNK_SIZE))
            cursor.at += nval * 4
        chunks, dataset = 0, ""
        if cursor.at < cursor.size:
            chunks = cursor.number("number of chunks", 0, i32)
        if cursor.at < cursor.size:
            dataset = cursor.text("name of the dataset", 0)
        if cursor.at < cursor.size:
            raise cursor.error(f"{cursor.size - cursor.at} bytes after the end")
        datasets = (dataset,) if dataset else ()
        return Importance(entries, datasets, chunks, legacy=True, _files=files.pop_all())


def write(importance: Importance, path: Path) -> str:
    """Write `importance` atomically; returns the sha256 of the file."""
    chunk = importance.chunk_size or DEFAULT_CHUNK_SIZE
    names = sorted((n for n, e in importance.entries.items() if e.counts.any()), key=str.encode)
    if not names:
        raise InputError("an importance matrix without data cannot be written")
    with hashed_file(path) as file:
        file.put(struct.pack("<i", len(names)))
        for name in names:
            entry = importance.entries[name]
            ncall = -(-int(entry.counts.max()) // chunk)
            if ncall >= 1 << 31 or entry.size >= 1 << 31:
                raise InputError(f"{name}: too large for the legacy form")
            values = entry.weights() * np.float32(ncall)
            file.put(_text(name) + struct.pack("<ii", ncall, entry.size) + values.astype("<f4").tobytes())
        dataset = importance.datasets[-1] if importance.datasets else ""
        file.put(struct.pack("<i", importance.chunk_count) + _text(dataset))
    return file.sha256


def _values(path: Path, file: FileIO, offset: int, scale: int, start: int, n: int) -> F32:
    data = os.pread(file.fileno(), n * 4, offset + start * 4)
    if len(data) != n * 4:
        raise InputError(f"{path}: the file shrank while it was read")
    with np.errstate(over="ignore"):  # what leaves the range of float32 is found by the check
        return np.frombuffer(data, dtype="<f4") * np.float32(scale)


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<i", len(data)) + data
