"""The header of one GGUF file: metadata and tensor table, from untrusted bytes.

Read through a window that grows by bounded preads, so neither the file nor what it claims decides how much
is read; every number is checked against the bytes that are really there before it is used. Where the
format and llama.cpp differ, the stricter rule holds, except that gaps between tensors are allowed.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from errno import EMFILE, ENFILE, ENOMEM
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np

from apex_quant.errors import GGUFError, ResourceError
from apex_quant.gguf import limits
from apex_quant.gguf.limits import Budget
from apex_quant.gguf.types import TYPES_BY_ID, GGMLType
from apex_quant.gguf.values import DTYPES, Value, ValueType

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_HEAD = struct.Struct("<4sIQQ")
_ARRAY_HEAD = struct.Struct("<IQ")
_REST_OF_ROW = [struct.Struct(f"<{n}qIQ") for n in range(limits.MAX_DIMS + 1)]  # dimensions, type, offset
_LONGEST_ROW = 8 + limits.MAX_NAME_BYTES + 4 + _REST_OF_ROW[-1].size
_Row = tuple[str, tuple[int, ...], GGMLType, int, int]  # name, shape, type, offset in the section, bytes
_VALUE_TYPES = {int(kind): kind for kind in ValueType}
ALIGNMENT_KEY = "general.alignment"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor. `shape` in ggml order, row length first, without trailing ones. `offset` is absolute in its file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int
    file: int = 0

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return self.nbytes // self.type.bytes * self.type.block

    @property
    def rows(self) -> int:
        """Number of rows of shape[0] weights."""
        return self.n_elements // self.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.type.row_bytes(self.shape[0])


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """One file of a model. `header_bytes` is where its data section starts, padding included."""

    path: Path
    size: int
    version: int
    alignment: int
    header_bytes: int
    metadata: Mapping[str, Value] = field(repr=False)


def open_regular(path: str) -> tuple[int, int]:
    """Opens `path` for reading: (descriptor, size). Anything but a regular file is a GGUFError.

    Non-blocking, so that a fifo or a device cannot make the open itself wait.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        if error.errno in (EMFILE, ENFILE, ENOMEM):
            raise ResourceError(f"{path}: cannot be opened: {error.strerror}") from None
        raise GGUFError(f"cannot be opened: {error.strerror}", path) from None
    except ValueError as error:  # a null byte in the name
        raise GGUFError(f"cannot be opened: {error}", repr(path)) from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        folder = stat.S_ISDIR(status.st_mode)
        raise GGUFError("is a folder: name a file in it" if folder else "is not a regular file", path)
    return fd, status.st_size


class _Window:
    """The bytes of the file from its start to as far as parsing needed them."""

    __slots__ = ("budget", "buffer", "fd", "path", "position", "size")

    def __init__(self, path: str, fd: int, size: int, budget: Budget) -> None:
        self.path, self.fd, self.size, self.budget = path, fd, size, budget
        self.buffer = bytearray()
        self.position = 0

    def fail(self, message: str, field: str, offset: int | None = None) -> GGUFError:
        return GGUFError(message, self.path, self.position if offset is None else offset, field)

    def need(self, end: int, field: str) -> None:
        """Makes bytes up to `end` present, or says what the file lacks."""
        buffer = self.buffer
        if end <= len(buffer):
            return
        if end > self.size:
            raise self.fail(f"needs bytes up to {end}, the file ends at {self.size}", field)
        if end > self.budget.header_bytes:
            raise self.fail(f"the header passes {self.budget.header_bytes} bytes, the most that is read", field)
        while len(buffer) < end:
            wanted = min(max(len(buffer), limits.FIRST_READ), limits.LARGEST_READ, self.size - len(buffer))
            try:
                chunk = os.pread(self.fd, wanted, len(buffer))
            except OSError as error:
                raise self.fail(f"cannot be read: {error.strerror}", field, len(buffer)) from None
            if not chunk:
                raise self.fail("the file was truncated while it was read", field, len(buffer))
            buffer += chunk

    def u32(self, field: str) -> int:
        self.need(self.position + 4, field)
        number: int = _U32.unpack_from(self.buffer, self.position)[0]
        self.position += 4
        return number

    def text(self, start: int, length: int, field: str) -> str:
        """The name in `length` bytes from `start` on: printable UTF-8, since names end up in text files."""
        try:
            text = self.buffer[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.fail("a name that is not UTF-8", field, start) from None
        if not text.isprintable():
            raise self.fail(f"a name with control characters: {text!r}", field, start)
        return text

    def key(self, field: str) -> str:
        """A metadata key."""
        start = self.position + 8
        self.need(start, field)
        length: int = _U64.unpack_from(self.buffer, self.position)[0]
        if not 0 < length <= limits.MAX_KEY_BYTES:
            raise self.fail(f"a key of {length} bytes, must be 1 to {limits.MAX_KEY_BYTES}", field)
        self.need(start + length, field)
        self.position = start + length
        return self.text(start, length, field)

    def skip_strings(self, count: int, field: str) -> None:
        """Steps over `count` strings. The loop of every vocabulary: kept tight."""
        self.budget.spend("strings", count, self.path, self.position, field)
        unpack, buffer, position = _U64.unpack_from, self.buffer, self.position
        last = len(buffer) - 8
        for _ in range(count):
            if position > last:
                self.position = min(position, self.size)
                self.need(position + 8, field)
                last = len(buffer) - 8
            position += 8 + unpack(buffer, position)[0]
        self.position = min(position, self.size)
        self.need(position, field)
        self.position = position


def _value_type(window: _Window, field: str) -> ValueType:
    number = window.u32(field)
    kind = _VALUE_TYPES.get(number)
    if kind is None:
        raise window.fail(f"unknown value type {number}", field, window.position - 4)
    return kind


def _skip_value(window: _Window, key: str) -> tuple[ValueType, ValueType | None, int, int]:
    """Steps over the value of `key`: (type, element type, first byte, end)."""
    kind = _value_type(window, key)
    start = window.position
    element = None
    if kind is ValueType.STRING:
        window.need(start + 8, key)
        window.position += 8
        end = window.position + _U64.unpack_from(window.buffer, start)[0]
        window.need(end, key)
    elif kind is not ValueType.ARRAY:
        end = start + DTYPES[kind].itemsize
        window.need(end, key)
        if kind is ValueType.BOOL and window.buffer[start] > 1:
            raise window.fail(f"a bool of {window.buffer[start]}", key)
    else:
        window.need(start + _ARRAY_HEAD.size, key)
        element = _value_type(window, key)
        if element is ValueType.ARRAY:
            raise window.fail("an array of arrays, which llama.cpp does not read either", key)
        count: int = _U64.unpack_from(window.buffer, window.position)[0]
        window.position += 8
        if element is ValueType.STRING:
            window.skip_strings(count, key)
            end = window.position
        else:
            end = window.position + count * DTYPES[element].itemsize
            window.need(end, key)
            if element is ValueType.BOOL and count:
                flags = np.frombuffer(window.buffer, np.uint8, count, window.position)
                largest = int(flags.max())
                del flags  # the window cannot grow while a view of it exists
                if largest > 1:
                    raise window.fail(f"a bool of {largest}", key)
    window.position = end
    return kind, element, start, end


def _alignment(window: _Window, value: Value | None, offset: int) -> int:
    """The checked general.alignment, whose value stands at `offset`."""
    if value is None:
        return limits.DEFAULT_ALIGNMENT
    if value.type is not ValueType.UINT32:
        raise window.fail(f"must be of type UINT32, is {value.type.name}", ALIGNMENT_KEY, offset)
    alignment = int(str(value.data))
    if alignment & (alignment - 1) or not 0 < alignment <= limits.MAX_ALIGNMENT:
        raise window.fail(f"{alignment}, must be a power of two up to {limits.MAX_ALIGNMENT}", ALIGNMENT_KEY, offset)
    return alignment


def _table_row(window: _Window, number: int) -> _Row:
    """One row of the tensor table. Models have thousands: one bounds check for the longest possible row."""
    start, buffer = window.position, window.buffer
    if start + _LONGEST_ROW > len(buffer):
        window.need(min(start + _LONGEST_ROW, window.size), f"tensor {number}")
    try:
        (length,) = _U64.unpack_from(buffer, start)
        if not 0 < length <= limits.MAX_NAME_BYTES:
            raise window.fail(f"a name of {length} bytes, must be 1 to {limits.MAX_NAME_BYTES}", f"tensor {number}")
        position = start + 8 + length
        (n_dims,) = _U32.unpack_from(buffer, position)
        name = window.text(start + 8, length, f"tensor {number}")
        if n_dims > limits.MAX_DIMS:
            raise window.fail(f"{n_dims} dimensions, at most {limits.MAX_DIMS}", name, position)
        *dims, type_id, offset = _REST_OF_ROW[n_dims].unpack_from(buffer, position + 4)
    except struct.error:
        raise window.fail(f"cut off by the end of the file at {window.size}", f"tensor {number}") from None
    shape = tuple(dims) or (1,)  # no dimensions: one weight, as in ggml
    if min(shape) < 1:
        raise window.fail(f"a dimension of {min(shape)}", name, position + 4)
    elements = math.prod(shape)
    if elements > limits.MAX_ELEMENTS:
        raise window.fail(f"{elements} weights, at most {limits.MAX_ELEMENTS}", name, position + 4)
    kind = TYPES_BY_ID.get(type_id)
    if kind is None:
        raise window.fail(f"unknown or retired tensor type {type_id}", name, position + 4 + 8 * n_dims)
    if shape[0] % kind.block:
        raise window.fail(
            f"rows of {shape[0]} weights, not a multiple of {kind.name}'s block of {kind.block}",
            name,
            position + 4,
        )
    window.position = position + 4 + _REST_OF_ROW[n_dims].size
    while len(shape) > 1 and shape[-1] == 1:  # 256 x 1 is 256, as ggml_n_dims counts; we write it so too
        shape = shape[:-1]
    return name, shape, kind, offset, elements // kind.block * kind.bytes


def _place(window: _Window, table: list[_Row], start: int, alignment: int, file: int) -> list[TensorInfo]:
    """The tensors with absolute offsets: aligned, inside the file, apart from each other."""
    placed: list[TensorInfo] = []
    size, end, in_order = window.size, start, True
    for name, shape, kind, relative, nbytes in table:
        offset = start + relative
        if relative % alignment:
            raise window.fail(f"data at offset {relative}, not aligned to {alignment}", name, offset)
        if offset + nbytes > size:
            raise window.fail(f"data of {nbytes} bytes reaches beyond the end of the file at {size}", name, offset)
        in_order = in_order and offset >= end
        end = offset + nbytes
        placed.append(TensorInfo(name, shape, kind, offset, nbytes, file))
    if not in_order:
        by_offset = sorted(placed, key=lambda info: info.offset)
        for before, info in pairwise(by_offset):
            if info.offset < before.offset + before.nbytes:
                raise window.fail(f"data overlaps that of {before.name}", info.name, info.offset)
    return placed


def read_header(path: str, fd: int, size: int, budget: Budget, index: int) -> tuple[GGUFFile, list[TensorInfo]]:
    """Parses the header of an open file of `size` bytes, shard `index` of its model.

    Returns the file and its tensors in the table's order. Raises GGUFError with path, offset and field.
    """
    window = _Window(path, fd, size, budget)
    if size < _HEAD.size:
        raise window.fail(f"a file of {size} bytes is no GGUF file", "header", 0)
    window.need(_HEAD.size, "header")
    magic, version, n_tensors, n_keys = _HEAD.unpack_from(window.buffer)
    if magic != b"GGUF":
        raise window.fail(f"starts with {magic!r}, not with b'GGUF': no GGUF file", "magic", 0)
    if version & 0xFFFF == 0 and version:
        raise window.fail("a big-endian file; convert it with gguf-py's gguf_convert_endian", "version", 4)
    if version not in limits.VERSIONS:
        raise window.fail(f"GGUF version {version}; versions 2 and 3 are read", "version", 4)
    budget.spend("tensors", n_tensors, path, 8, "tensor count")
    budget.spend("keys", n_keys, path, 16, "key count")
    window.position = _HEAD.size

    spans: dict[str, tuple[ValueType, ValueType | None, int, int]] = {}
    for number in range(n_keys):
        field, start = f"key {number}", window.position
        key = window.key(field)
        if key in spans:
            raise window.fail(f"the key {key} is given twice", field, start)
        spans[key] = _skip_value(window, key)

    table: dict[str, _Row] = {}
    for number in range(n_tensors):
        start = window.position
        row = _table_row(window, number)
        if row[0] in table:
            raise window.fail(f"the tensor {row[0]} is given twice", f"tensor {number}", start)
        table[row[0]] = row

    end = window.position
    budget.spend_bytes(end, path)
    del window.buffer[end:]
    raw = memoryview(window.buffer).toreadonly()
    metadata = {key: Value(kind, raw[a:b], element) for key, (kind, element, a, b) in spans.items()}
    at = spans[ALIGNMENT_KEY][2] if ALIGNMENT_KEY in spans else 0
    alignment = _alignment(window, metadata.get(ALIGNMENT_KEY), at)
    data_start = -(-end // alignment) * alignment
    tensors = _place(window, list(table.values()), data_start, alignment, index)
    header_bytes = min(data_start, size)
    return GGUFFile(Path(path), size, version, alignment, header_bytes, MappingProxyType(metadata)), tensors
