"""Metadata values: typed, decoded on first use, and re-written byte for byte.

A Value keeps the bytes that stand in the file after the value type (for arrays: element type, count,
elements), so copying metadata never depends on decoding it. Strings are UTF-8 with surrogateescape, since
vocabulary entries may be raw bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt


class ValueType(IntEnum):
    """The ids of GGUF's metadata types."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_CODES: dict[ValueType, str] = {  # the same letter in struct and numpy, little-endian
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT16: "<H",
    ValueType.INT16: "<h",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<?",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}
DTYPES: dict[ValueType, np.dtype[Any]] = {kind: np.dtype(code) for kind, code in _CODES.items()}
_SCALARS = {kind: struct.Struct(code) for kind, code in _CODES.items()}

_U64 = struct.Struct("<Q")
_ARRAY_HEAD = struct.Struct("<IQ")

Data = bool | int | float | str | npt.NDArray[Any] | tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """One metadata value. `raw` is its encoding in the file; `element` the type of an array's elements."""

    type: ValueType
    raw: bytes | memoryview = field(repr=False)
    element: ValueType | None = None

    @cached_property
    def data(self) -> Data:
        """The value in Python: bool, int, float, str, a read-only numpy array, or a tuple of str."""
        if self.type is ValueType.STRING:
            return decode(self.raw[_U64.size :])
        if self.element is None:
            scalar: bool | int | float = _SCALARS[self.type].unpack(self.raw)[0]
            return scalar
        if self.element is not ValueType.STRING:
            array = np.frombuffer(self.raw, DTYPES[self.element], self.count, _ARRAY_HEAD.size)
            array.flags.writeable = False
            return array
        strings: list[str] = []
        position = _ARRAY_HEAD.size
        for _ in range(self.count):
            start = position + _U64.size
            position = start + _U64.unpack_from(self.raw, position)[0]
            strings.append(decode(self.raw[start:position]))
        return tuple(strings)

    @property
    def count(self) -> int:
        """Elements of an array, without decoding it; 1 for anything else."""
        return 1 if self.element is None else int(_ARRAY_HEAD.unpack_from(self.raw)[1])

    def __str__(self) -> str:
        return f"{self.element.name.lower()}[{self.count}]" if self.element is not None else str(self.data)

    @classmethod
    def scalar(cls, kind: ValueType, number: bool | int | float) -> Value:
        """A number of type `kind`. ValueError when it does not fit."""
        try:
            return cls(kind, _SCALARS[kind].pack(number))
        except (struct.error, OverflowError) as error:
            raise ValueError(f"{number!r} is not a {kind.name}: {error}") from None

    @classmethod
    def u8(cls, number: int) -> Value:
        return cls.scalar(ValueType.UINT8, number)

    @classmethod
    def i8(cls, number: int) -> Value:
        return cls.scalar(ValueType.INT8, number)

    @classmethod
    def u16(cls, number: int) -> Value:
        return cls.scalar(ValueType.UINT16, number)

    @classmethod
    def i16(cls, number: int) -> Value:
        return cls.scalar(ValueType.INT16, number)

    @classmethod
    def u32(cls, number: int) -> Value:
        return cls.scalar(ValueType.UINT32, number)

    @classmethod
    def i32(cls, number: int) -> Value:
        return cls.scalar(ValueType.INT32, number)

    @classmethod
    def u64(cls, number: int) -> Value:
        return cls.scalar(ValueType.UINT64, number)

    @classmethod
    def i64(cls, number: int) -> Value:
        return cls.scalar(ValueType.INT64, number)

    @classmethod
    def f32(cls, number: float) -> Value:
        return cls.scalar(ValueType.FLOAT32, number)

    @classmethod
    def f64(cls, number: float) -> Value:
        return cls.scalar(ValueType.FLOAT64, number)

    @classmethod
    def bool_(cls, flag: bool) -> Value:
        return cls.scalar(ValueType.BOOL, flag)

    @classmethod
    def string(cls, text: str) -> Value:
        return cls(ValueType.STRING, encode_string(text))

    @classmethod
    def array(cls, element: ValueType, data: Iterable[Any]) -> Value:
        """An array of numbers (sequence or numpy array; integers must fit) or of str."""
        if element is ValueType.STRING:
            encoded = [encode_string(text) for text in data]
            return cls(ValueType.ARRAY, _ARRAY_HEAD.pack(element, len(encoded)) + b"".join(encoded), element)
        if element is ValueType.ARRAY:
            raise ValueError("GGUF readers know no arrays of arrays")
        given = np.asarray(data if isinstance(data, np.ndarray) else list(data))
        array = given.astype(DTYPES[element])
        if array.ndim != 1 or (array.dtype.kind in "iu" and not np.array_equal(array, given)):
            raise ValueError(f"not a list of {element.name}")
        return cls(ValueType.ARRAY, _ARRAY_HEAD.pack(element, array.size) + array.tobytes(), element)


def decode(raw: bytes | memoryview) -> str:
    """UTF-8 with surrogateescape: bytes that are no UTF-8 survive a round trip."""
    return str(raw, "utf-8", "surrogateescape")


def encode_string(text: str) -> bytes:
    """A GGUF string: length as u64, then the bytes."""
    raw = text.encode("utf-8", "surrogateescape")
    return _U64.pack(len(raw)) + raw
