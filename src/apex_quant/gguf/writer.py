"""GGUF output: the exact layout of a file before any tensor exists.

The header is written first; its size and every offset follow from names, shapes and types alone, so tensors
can be written in any order, resumed, and hashed as one data section equal to llama.cpp's.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from apex_quant.errors import UsageError
from apex_quant.gguf import limits
from apex_quant.gguf.header import ALIGNMENT_KEY
from apex_quant.gguf.reader import SPLIT_COUNT, SPLIT_KEYS, SPLIT_NO, SPLIT_TENSORS
from apex_quant.gguf.types import GGMLType
from apex_quant.gguf.values import Value, ValueType, encode_string

_HEAD = struct.Struct("<4sIQQ")
_U32 = struct.Struct("<I")


class TensorLike(Protocol):
    """What layout() needs of a tensor: TensorSpec, TensorInfo or anything alike."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def type(self) -> GGMLType: ...


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written. `shape` in ggml order: the row length comes first."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def nbytes(self) -> int:
        """Bytes of its data, padding not included."""
        return tensor_bytes(self)


@dataclass(frozen=True)
class Layout:
    """A GGUF file to the byte. `header` ends where the data section starts; `offsets` are absolute."""

    header: bytes = field(repr=False)
    offsets: dict[str, int] = field(repr=False)
    total_bytes: int
    alignment: int
    spans: dict[str, tuple[int, int]] = field(repr=False)

    @property
    def data_start(self) -> int:
        """Offset of the data section."""
        return len(self.header)

    def value_span(self, key: str) -> tuple[int, int]:
        """(offset, length) of a string value's bytes in the header, to fill it in later at equal length."""
        return self.spans[key]


def tensor_bytes(tensor: TensorLike) -> int:
    """Bytes of a tensor's data. ValueError when the rows are no multiple of the type's block."""
    rows = 1
    for dim in tensor.shape[1:]:
        rows *= dim
    return tensor.type.row_bytes(tensor.shape[0]) * rows


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


def _encode_value(value: Value) -> bytes:
    return _U32.pack(value.type) + value.raw


def _encode_row(tensor: TensorLike, offset: int) -> bytes:
    name, shape = encode_string(tensor.name), tensor.shape
    if not 0 < len(name) - 8 <= limits.MAX_NAME_BYTES or not tensor.name.isprintable():
        raise ValueError(f"{tensor.name!r} cannot be a tensor's name: 1 to {limits.MAX_NAME_BYTES} printable bytes")
    if not 0 < len(shape) <= limits.MAX_DIMS or min(shape) < 1:
        raise ValueError(f"{tensor.name} cannot have the shape {shape}")
    while len(shape) > 1 and shape[-1] == 1:  # as ggml_n_dims
        shape = shape[:-1]
    return name + struct.pack(f"<I{len(shape)}qIQ", len(shape), *shape, tensor.type.id, offset)


def layout(metadata: Mapping[str, Value], tensors: Sequence[TensorLike], alignment: int | None = None) -> Layout:
    """Where everything lies in a GGUF v3 file with these keys and tensors, in the order given.

    As gguf_write_to_file does it: each tensor padded to the alignment, the last one too; trailing
    dimensions of 1 dropped. `alignment` defaults to general.alignment, or 32, and is written as that key
    where it is not 32. ValueError for what our own reader would refuse.
    """
    metadata = dict(metadata)
    if alignment is None:
        given = metadata.get(ALIGNMENT_KEY)
        alignment = int(str(given.data)) if given is not None else limits.DEFAULT_ALIGNMENT
    if alignment & (alignment - 1) or not 0 < alignment <= limits.MAX_ALIGNMENT:
        raise ValueError(f"an alignment of {alignment} is not a power of two up to {limits.MAX_ALIGNMENT}")
    if ALIGNMENT_KEY in metadata or alignment != limits.DEFAULT_ALIGNMENT:
        metadata[ALIGNMENT_KEY] = Value.u32(alignment)
    work = {
        "keys": len(metadata),
        "tensors": len(tensors),
        "strings": sum(value.count for value in metadata.values() if value.element is ValueType.STRING),
    }
    if sum(limits.WORK[what] * count for what, count in work.items()) > limits.MAX_WORK:
        raise ValueError(f"more than a reader accepts: {work}")

    parts = [_HEAD.pack(b"GGUF", limits.VERSIONS[-1], len(tensors), len(metadata))]
    position = len(parts[0])
    spans: dict[str, tuple[int, int]] = {}
    for key, value in metadata.items():
        name = encode_string(key)
        if not 0 < len(name) - 8 <= limits.MAX_KEY_BYTES or not key.isprintable():
            raise ValueError(f"{key[:80]!r} cannot be a key")
        parts.append(name + _encode_value(value))
        position += len(parts[-1])
        if value.type is ValueType.STRING:
            length = len(value.raw) - 8
            spans[key] = (position - length, length)

    offsets: dict[str, int] = {}
    data_bytes = 0
    for tensor in tensors:
        if tensor.name in offsets:
            raise ValueError(f"two tensors named {tensor.name}")
        parts.append(_encode_row(tensor, data_bytes))
        offsets[tensor.name] = data_bytes
        data_bytes += padded(tensor_bytes(tensor), alignment)

    header = b"".join(parts)
    if len(header) > limits.MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(header)} bytes, at most {limits.MAX_HEADER_BYTES}")
    header = header.ljust(padded(len(header), alignment), b"\0")
    start = len(header)
    return Layout(header, {name: start + at for name, at in offsets.items()}, start + data_bytes, alignment, spans)


def shard_groups(tensors: Sequence[TensorLike], max_bytes: int) -> list[int]:
    """The shard of each tensor by llama-gguf-split's --split-max-size rule.

    Tensor bytes padded to 32 are added up, metadata not; a tensor that would pass `max_bytes` opens the
    next shard. Where stock refuses a first tensor above the limit, it gets a shard of its own, as any
    later one does in stock.
    """
    groups: list[int] = []
    shard = filled = 0
    for tensor in tensors:
        size = padded(tensor_bytes(tensor), limits.DEFAULT_ALIGNMENT)
        if groups and filled + size > max_bytes:
            shard, filled = shard + 1, 0
        groups.append(shard)
        filled += size
    return groups


def shard_layouts(
    metadata: Mapping[str, Value],
    tensors: Sequence[TensorLike],
    max_bytes: int | None = None,
    groups: Sequence[int] | None = None,
    alignment: int | None = None,
) -> list[Layout]:
    """The layouts of the shards of one model, cut by size or as `groups` (the shard of each tensor) says.

    Metadata stands in the first shard only; split.no, split.count and split.tensors.count in each, and the
    alignment where it is not 32. UsageError when that makes more shards than a reader opens.
    """
    if (max_bytes is None) == (groups is None):
        raise ValueError("give either max_bytes or groups")
    if groups is None:
        assert max_bytes is not None
        groups = shard_groups(tensors, max_bytes)
    if len(groups) != len(tensors) or min(groups, default=0) < 0:
        raise ValueError("groups must name one shard, from 0 on, for every tensor")
    count = max(groups, default=0) + 1
    if count > limits.MAX_SHARDS:
        raise UsageError(
            f"that would make {count} shards, at most {limits.MAX_SHARDS} are allowed",
            hint="use a larger --split-max-size",
        )
    common = {key: value for key, value in metadata.items() if key not in SPLIT_KEYS}
    if alignment is None and ALIGNMENT_KEY in common:
        alignment = int(str(common[ALIGNMENT_KEY].data))
    layouts = []
    for shard in range(count):
        keys = dict(common) if shard == 0 else {}
        keys[SPLIT_NO] = Value.u16(shard)
        keys[SPLIT_TENSORS] = Value.i32(len(tensors))  # in llama-gguf-split's order
        keys[SPLIT_COUNT] = Value.u16(count)
        members = [tensor for tensor, group in zip(tensors, groups, strict=True) if group == shard]
        layouts.append(layout(keys, members, alignment))
    return layouts
