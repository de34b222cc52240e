"""Merging: several importance matrices of one model become that of all their texts together.

Sums and counts are additive, so the merged matrix is what one run over all texts would have given. A filled matrix
(key apex.prior) is no sum any more and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from apex_quant.errors import InputError, UsageError
from apex_quant.gguf.values import Value, ValueType
from apex_quant.importance.imatrix import F32, MAX_SUM, Entry, Extra, Importance

EXTRA_MARK = ".apex_"
SUM_KEYS = ("tokens", "chunks", "documents")
"""Last words of the apex.* keys that count something, and are added."""

_INTEGERS = (ValueType.UINT32, ValueType.UINT64, ValueType.INT32, ValueType.INT64)
_MAX_CHUNKS = (1 << 32) - 1


def merge(matrices: Sequence[str | Path | Importance]) -> Importance:
    """The sum of `matrices`, given as files or as objects (which stay the caller's to close).

    Sums are added in float64 and rounded once; an entry that only some have is theirs alone. Extra tensors are sums
    too: they are added where every matrix with data of that tensor has them, and named in `ignored` otherwise. Keys
    that count (SUM_KEYS) are added, other keys kept where all agree. Values are read when they are asked for.
    Raises InputError for filled matrices, other chunk sizes and entries of other shapes, UsageError for nothing.
    """
    if not matrices:
        raise UsageError("no importance matrix was given to merge")
    with ExitStack() as files:
        opened = [m if isinstance(m, Importance) else files.enter_context(Importance.read(m)) for m in matrices]
        names = [_name(given, one) for given, one in zip(matrices, opened, strict=True)]
        for name, one in zip(names, opened, strict=True):
            if one.prior is not None:
                raise InputError(
                    f"{name} is filled ({one.prior}) and no longer a sum", hint="merge the raw files, then fill"
                )
            if one.chunk_size != opened[0].chunk_size:
                raise InputError(
                    f"{names[0]} was made in chunks of {opened[0].chunk_size} tokens, {name} of {one.chunk_size}",
                    hint="matrices of different context lengths do not belong together",
                )
        chunks = sum(one.chunk_count for one in opened)
        if chunks > _MAX_CHUNKS:
            raise InputError(f"{chunks} chunks are more than the file form can state")
        extras, lost = _extras(opened, names)
        return Importance(
            _entries(opened, names),
            datasets=tuple(dict.fromkeys(text for one in opened for text in one.datasets)),
            chunk_count=chunks,
            chunk_size=opened[0].chunk_size,
            metadata=_metadata(opened),
            legacy=any(one.legacy for one in opened),
            extras=extras,
            ignored=tuple(dict.fromkeys([*lost, *(text for one in opened for text in one.ignored)])),
            _files=files.pop_all(),
        )


def _entries(opened: Sequence[Importance], names: Sequence[str]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name in sorted({name for one in opened for name in one.entries}, key=_bytes):
        found = [(where, one.entries[name]) for where, one in zip(names, opened, strict=True) if name in one.entries]
        first_file, first = found[0]
        for where, entry in found[1:]:
            if (entry.n_mat, entry.n_in) != (first.n_mat, first.n_in):
                raise InputError(
                    f"{name}: {first.n_mat} x {first.n_in} sums in {first_file}, {entry.n_mat} x {entry.n_in} in "
                    f"{where}",
                    hint="they are of different models; or one comes from a .dat file, which has no rows per expert",
                )
        parts = [entry for _, entry in found]
        counts = np.stack([entry.counts for entry in parts]).sum(axis=0, dtype=np.int64)
        entries[name] = Entry(counts, first.n_in, partial(_sum, name, [entry.read for entry in parts]))
    return entries


def _extras(opened: Sequence[Importance], names: Sequence[str]) -> tuple[dict[str, Extra], list[str]]:
    """The extra tensors that can be added, and the names of those that cannot."""
    extras: dict[str, Extra] = {}
    lost: list[str] = []
    for name in sorted({name for one in opened for name in one.extras}, key=_bytes):
        owner = name.partition(EXTRA_MARK)[0]
        if any(name not in one.extras and _has_data(one, owner) for one in opened):
            lost.append(name)  # it would not cover all the tokens that the counts do
            continue
        found = [(where, one.extras[name]) for where, one in zip(names, opened, strict=True) if name in one.extras]
        first_file, first = found[0]
        for where, extra in found[1:]:
            if extra.size != first.size:
                raise InputError(f"{name}: {first.size} values in {first_file}, {extra.size} in {where}")
        extras[name] = Extra(first.shape, partial(_sum, name, [extra.read for _, extra in found]))
    return extras, lost


def _has_data(importance: Importance, owner: str) -> bool:
    """Whether a matrix has entries of the tensor, or of the layer, that an extra tensor belongs to."""
    return any(name == owner or name.startswith(owner + ".") for name in importance.entries)


def _sum(name: str, reads: Sequence[Callable[[int, int], F32]], start: int, n: int) -> F32:
    total = np.zeros(n)
    for read in reads:
        total += read(start, n)
    if not (np.abs(total) <= MAX_SUM).all():
        raise InputError(f"{name}: the merged sums are too large")
    return total.astype(np.float32)


def _metadata(opened: Sequence[Importance]) -> dict[str, Value]:
    merged: dict[str, Value] = {}
    for key in dict.fromkeys(key for one in opened for key in one.metadata):
        values = [one.metadata[key] for one in opened if key in one.metadata]
        if key.startswith("apex.") and key.rpartition(".")[2] in SUM_KEYS and all(v.type in _INTEGERS for v in values):
            # a count that some files lack would say too little of the whole
            if len(values) == len(opened):
                merged[key] = Value.scalar(ValueType.UINT64, sum(_integer(value) for value in values))
        elif len(values) == len(opened) and all(_same(value, values[0]) for value in values):
            merged[key] = values[0]
    return merged


def _integer(value: Value) -> int:
    assert isinstance(value.data, int)
    return max(0, min(value.data, 1 << 56))


def _same(a: Value, b: Value) -> bool:
    return (a.type, a.element, bytes(a.raw)) == (b.type, b.element, bytes(b.raw))


def _name(given: str | Path | Importance, one: Importance) -> str:
    return str(given) if isinstance(given, str | Path) else one.file_name or "an importance matrix"


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
