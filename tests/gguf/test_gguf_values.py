"""Metadata values: types, round trips, exact bytes against PyPI gguf's writer."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_quant.gguf import Value, ValueType, layout, open_model

SCALARS: dict[str, tuple[Value, object]] = {
    "u8": (Value.u8(255), 255),
    "i8": (Value.i8(-128), -128),
    "u16": (Value.u16(65535), 65535),
    "i16": (Value.i16(-5), -5),
    "u32": (Value.u32(2**32 - 1), 2**32 - 1),
    "i32": (Value.i32(-(2**31)), -(2**31)),
    "u64": (Value.u64(2**64 - 1), 2**64 - 1),
    "i64": (Value.i64(-(2**63)), -(2**63)),
    "f32": (Value.f32(0.1), struct.unpack("f", struct.pack("f", 0.1))[0]),
    "f64": (Value.f64(0.1), 0.1),
    "true": (Value.bool_(True), True),
    "false": (Value.bool_(False), False),
    "string": (Value.string("zwölf 🐘"), "zwölf 🐘"),
    "nothing": (Value.string(""), ""),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalar(name: str) -> None:
    value, expected = SCALARS[name]
    assert value.data == expected
    assert type(value.data) is type(expected)
    assert value.count == 1
    assert str(value) == str(expected)


@pytest.mark.parametrize(
    ("make", "number"),
    [(Value.u8, 256), (Value.u8, -1), (Value.i32, 1 << 31), (Value.u64, 1 << 64), (Value.u16, 1.5)],
)
def test_scalar_out_of_range(make: object, number: float) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match="is not a"):
        make(number)


def test_nan_keeps_its_bits() -> None:
    value = Value.f32(math.nan)
    assert isinstance(value.data, float)
    assert math.isnan(value.data)
    assert value == Value.f32(math.nan)


@pytest.mark.parametrize("kind", [k for k in ValueType if k not in (ValueType.STRING, ValueType.ARRAY)])
def test_number_array(kind: ValueType) -> None:
    value = Value.array(kind, [1, 0, 1])
    assert value.count == 3
    assert isinstance(value.data, np.ndarray)
    assert value.data.tolist() == [1, 0, 1]
    assert not value.data.flags.writeable
    assert Value.array(kind, value.data) == value


def test_array_refuses_what_does_not_fit() -> None:
    with pytest.raises((ValueError, OverflowError)):
        Value.array(ValueType.UINT8, [256])
    with pytest.raises(ValueError, match="not a list of INT32"):
        Value.array(ValueType.INT32, np.array([1.5]))
    with pytest.raises(ValueError, match="not a list"):
        Value.array(ValueType.INT32, np.zeros((2, 2), np.int32))
    with pytest.raises(ValueError, match="arrays of arrays"):
        Value.array(ValueType.ARRAY, [])


@given(st.lists(st.binary(max_size=20)))
def test_strings_of_any_bytes(raw: list[bytes]) -> None:
    strings = [item.decode("utf-8", "surrogateescape") for item in raw]
    value = Value.array(ValueType.STRING, strings)
    assert value.data == tuple(strings)
    assert value.count == len(raw)


def test_bytes_equal_pypi_gguf(tmp_path: Path) -> None:
    """The same keys in the same order give the same header, byte for byte."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a", 7)
    writer.add_float32("b", 0.25)
    writer.add_bool("c", True)
    writer.add_string("d", "text")
    writer.add_uint64("e", 1 << 40)
    writer.add_array("f", [1, -2, 3])
    writer.add_array("g", ["x", "", "ü"])
    writer.add_array("h", [0.5, 1.5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    ours = layout(
        {
            "general.architecture": Value.string("llama"),
            "a": Value.u32(7),
            "b": Value.f32(0.25),
            "c": Value.bool_(True),
            "d": Value.string("text"),
            "e": Value.u64(1 << 40),
            "f": Value.array(ValueType.INT32, [1, -2, 3]),
            "g": Value.array(ValueType.STRING, ["x", "", "ü"]),
            "h": Value.array(ValueType.FLOAT32, [0.5, 1.5]),
        },
        [],
    )
    theirs = path.read_bytes()
    assert ours.header[: len(theirs)] == theirs
    with open_model(path) as model:
        assert layout(model.metadata, []).header == ours.header
