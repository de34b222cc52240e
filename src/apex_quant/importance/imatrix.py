"""The importance matrix: sums of squared activations per input channel, one row per expert, with counts.

An entry belongs to one weight tensor and holds `sums` [n_mat, n_in] (float32) and `counts` [n_mat], the
number of tokens that went into each row. The weight of a channel is sum / count, in float32, and 1 where the
count is 0: exactly what llama-quantize hands to the encoders (load_imatrix in tools/quantize/quantize.cpp).
Files are checked in full when read but the sums stay on disk until asked for, since those of a very large
model take more than a gigabyte.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from apex_quant.errors import InputError
from apex_quant.gguf.header import open_regular
from apex_quant.gguf.values import Value
from apex_quant.importance.mapping import same_input

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

# What llama.cpp takes for the size of a chunk when a file does not say (n_ctx of llama-imatrix).
DEFAULT_CHUNK_SIZE = 512
# Tensors for which stock ignores importance of the wrong size instead of stopping.
_SIZE_FORGIVEN = frozenset({"token_embd.weight", "per_layer_token_embd.weight"})
_CHECK_BLOCK = 1 << 20  # values looked at together: bounds the memory of a check
# Above this the encoders overflow float32 and some abort the process; real sums stay below 1e16.
MAX_SUM = 1e30
MAX_FILE_BYTES = 8 << 30  # 2 GB for 400 experts in 60 layers; bounds the time a hole-filled file can take
PRIOR = "apex.prior"
"""The key that marks a filled matrix (fill.py) and says by which rule."""


class TensorLike(Protocol):
    """The part of a tensor that importance depends on; shape in ggml order, row length first."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Entry:
    """Sums and counts of one tensor. `counts` int64 [n_mat]; `sums` float32 [n_mat, n_in], read on demand."""

    __slots__ = ("counts", "n_in", "read")

    def __init__(self, counts: I64, n_in: int, read: Callable[[int, int], F32]) -> None:
        """`read(start, n)` gives n of the n_mat * n_in sums, flat."""
        self.counts = counts
        self.n_in = n_in
        self.read = read

    @classmethod
    def of(cls, sums: ArrayLike, counts: ArrayLike) -> Self:
        """An entry in memory; a single row of sums may be flat. ValueError on shapes that differ."""
        count = np.atleast_1d(np.asarray(counts, dtype=np.int64)).copy()
        array = np.array(sums, dtype=np.float32, ndmin=2, order="C")
        if count.ndim != 1 or array.ndim != 2 or len(array) != len(count) or array.size == 0:
            raise ValueError(f"sums {array.shape} and counts {count.shape} do not belong together")
        flat = array.reshape(-1)
        return cls(count, array.shape[1], lambda start, n: flat[start : start + n])

    @property
    def n_mat(self) -> int:
        """Rows: experts of an expert tensor, else 1."""
        return len(self.counts)

    @property
    def size(self) -> int:
        """Values in all rows."""
        return self.n_mat * self.n_in

    @property
    def sums(self) -> F32:
        return self.read(0, self.size).reshape(self.n_mat, self.n_in)

    def weights(self) -> F32:
        """Float32 [n_mat, n_in]: sum / count, ones where the count is 0."""
        weights = np.ones((self.n_mat, self.n_in), dtype=np.float32)
        seen = self.counts > 0
        np.divide(self.sums, self.counts.astype(np.float32)[:, None], out=weights, where=seen[:, None])
        return weights

    def check(self, name: str, where: str = "importance matrix") -> None:
        """InputError naming the entry unless all counts are >= 0 and all sums from 0 to MAX_SUM."""
        if (self.counts < 0).any():
            row = int(np.flatnonzero(self.counts < 0)[0])
            raise InputError(f"{where}: {name}: count {self.counts[row]} of row {row} is negative")
        for start in range(0, self.size, _CHECK_BLOCK):
            block = self.read(start, min(_CHECK_BLOCK, self.size - start))
            good = (block >= 0) & (block <= MAX_SUM)  # false for NaN
            if not good.all():
                at = int(np.flatnonzero(~good)[0])
                row, channel = divmod(start + at, self.n_in)
                raise InputError(
                    f"{where}: {name}: sum {block[at]} of channel {channel} in row {row} "
                    f"is not a number from 0 to {MAX_SUM:g}",
                    hint="the file is damaged or was made from broken activations; make it again",
                )


class Extra:
    """A tensor beyond sums and counts, under a name with `.apex_` in it: stock's loader passes over it.

    Float32 of any finite values; `shape` as numpy has it, read on demand.
    """

    __slots__ = ("read", "shape")

    def __init__(self, shape: tuple[int, ...], read: Callable[[int, int], F32]) -> None:
        """`read(start, n)` gives n of the values, flat."""
        self.shape = shape
        self.read = read

    @classmethod
    def of(cls, values: ArrayLike) -> Self:
        """One in memory. ValueError without values."""
        array = np.array(values, dtype=np.float32, ndmin=1, order="C")
        if array.size == 0:
            raise ValueError("an extra tensor without values")
        flat = array.reshape(-1)
        return cls(array.shape, lambda start, n: flat[start : start + n])

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def values(self) -> F32:
        return self.read(0, self.size).reshape(self.shape)

    def check(self, name: str, where: str = "importance matrix") -> None:
        """InputError naming the tensor unless all values are finite."""
        for start in range(0, self.size, _CHECK_BLOCK):
            good = np.isfinite(self.read(start, min(_CHECK_BLOCK, self.size - start)))
            if not good.all():
                at = start + int(np.flatnonzero(~good)[0])
                raise InputError(f"{where}: {name}: value {at} is not finite", "the file is damaged; make it again")


@dataclass(eq=False)
class Importance:
    """An importance matrix: entries by tensor name, and what it was made from.

    `legacy` says that it came from a .dat file, which knows neither tokens nor experts: there counts are the
    file's chunks times 512 and expert rows lie one after the other in a single row. `metadata` are further
    keys of a GGUF file (not imatrix.*) and `extras` its apex tensors, both kept when it is written again;
    `ignored` are tensors of another kind, and those that merging could not keep.
    `file_name` (without directory) and `sha256` are those of the file read.
    """

    entries: dict[str, Entry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = DEFAULT_CHUNK_SIZE
    metadata: dict[str, Value] = field(default_factory=dict)
    legacy: bool = False
    extras: dict[str, Extra] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    file_name: str | None = None
    sha256: str | None = None
    _files: ExitStack = field(default_factory=ExitStack, repr=False)

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, tuple[ArrayLike, ArrayLike]],
        *,
        extras: Mapping[str, ArrayLike] | None = None,
        **about: Any,
    ) -> Importance:
        """From {tensor name: (sums [n_mat, n_in], counts [n_mat])}; checked as a file would be.

        `extras` are {name with .apex_ in it: values}, `about` the other fields (datasets, chunk_count, chunk_size,
        metadata).
        """
        entries = {name: Entry.of(sums, counts) for name, (sums, counts) in arrays.items()}
        more = {name: Extra.of(values) for name, values in (extras or {}).items()}
        made = cls(entries, extras=more, **about)
        made.check()
        return made

    # --- files ---

    @classmethod
    def read(cls, path: str | Path) -> Importance:
        """Read an importance matrix in GGUF or legacy .dat form, told apart by content.

        Every value is checked. The file stays open until `close()`. Raises InputError (GGUFError for a
        broken container) naming the file and the entry.
        """
        from apex_quant.importance import gguf_form, legacy

        path = Path(path)
        fd, size = open_regular(str(path))
        with os.fdopen(fd, "rb") as file:
            if size > MAX_FILE_BYTES:
                raise InputError(f"{path}: {size} bytes, too large for an importance matrix")
            is_gguf = file.read(4) == b"GGUF"
            importance = gguf_form.read(path) if is_gguf else legacy.read(path)
            try:
                importance.check(str(path))
            except BaseException:
                importance.close()
                raise
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        importance.file_name, importance.sha256 = path.name, digest
        return importance

    def write(self, path: str | Path) -> str:
        """Write in GGUF form as llama-imatrix does (atomically); returns the file's sha256."""
        from apex_quant.importance import gguf_form

        return gguf_form.write(self, Path(path))

    def write_dat(self, path: str | Path) -> str:
        """Write in legacy form as llama-imatrix --output-format dat does; returns the file's sha256.

        Loses token counts, and rounds: values are stored as mean times chunks. Entries without any data
        are left out, as the form cannot say so.
        """
        from apex_quant.importance import legacy

        return legacy.write(self, Path(path))

    def close(self) -> None:
        """Close the file; sums that are still on disk can no longer be read."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self, where: str = "importance matrix") -> None:
        """InputError naming the tensor unless all counts, sums and extra values are sane. Reads everything."""
        for name, entry in self.entries.items():
            entry.check(name, where)
        for name, extra in self.extras.items():
            extra.check(name, where)

    # --- lookup ---

    @property
    def prior(self) -> str | None:
        """The rule by which this matrix was filled ('shrink K=64'); None for a raw one, which can be merged."""
        value = self.metadata.get(PRIOR)
        return None if value is None else value.data if isinstance(value.data, str) else str(value)

    def weights(self, name: str) -> F32:
        """Weights of entry `name`, float32 [n_mat, n_in], as llama-quantize makes them. KeyError."""
        return self.entries[name].weights()

    def find(self, name: str) -> str | None:
        """Name of the entry that serves tensor `name`: its own, or that of its fused or split form."""
        return next((n for n in (name, *same_input(name)) if n in self.entries), None)

    def for_tensor(self, tensor: TensorLike) -> F32 | None:
        """Weights for a tensor, float32 [ne2, ne0] (one row per expert), or None when there are none.

        Stock's size rule: the entry must hold ne0 * ne2 values, else InputError; token embeddings, whose
        entries some tools write per token, then have none. With pruned layers ask for the source tensor.
        """
        entry = self._entry_for(tensor)
        return None if entry is None else entry.weights().reshape(-1, tensor.shape[0])

    def fits(self, tensor: TensorLike) -> bool:
        """Whether `for_tensor` has weights for it. InputError as there; reads none of them."""
        return self._entry_for(tensor) is not None

    def _entry_for(self, tensor: TensorLike) -> Entry | None:
        found = self.find(tensor.name)
        if found is None:
            return None
        entry = self.entries[found]
        n_in, n_mat = tensor.shape[0], (tensor.shape[2] if len(tensor.shape) > 2 else 1)
        if entry.size == n_in * n_mat:
            return entry
        if tensor.name in _SIZE_FORGIVEN:
            return None
        raise InputError(
            f"importance of {found} has {entry.size} values, but {tensor.name} needs "
            f"{n_in} channels x {n_mat} = {n_in * n_mat}",
            hint="the importance matrix was made for another model",
        )

    def uncovered(self) -> dict[str, list[int]]:
        """Rows (experts) without data by entry name; empty for legacy files, see `experts_without_data`."""
        rows = {name: np.flatnonzero(entry.counts == 0).tolist() for name, entry in self.entries.items()}
        return {name: found for name, found in rows.items() if found}

    def experts_without_data(self, tensor: TensorLike) -> list[int]:
        """Experts of a tensor (0 for one without experts) whose weights are all 1 for want of data.

        Legacy files store 1 for every channel of such an expert, which is how they are recognized there.
        """
        weights = self.for_tensor(tensor)
        if weights is None:
            return []
        entry = self.entries[str(self.find(tensor.name))]
        if not self.legacy and entry.n_mat == len(weights):
            return [int(i) for i in np.flatnonzero(entry.counts == 0)]
        return [int(i) for i in np.flatnonzero((weights == 1).all(axis=1))]

    def quantize_metadata(self) -> dict[str, Value]:
        """The quantize.imatrix.* keys that llama-quantize puts into a quantized file.

        Stock stores the paths it was given; here they are cut to file names, so that equal runs give equal
        files wherever they take place.
        """
        keys: dict[str, Value] = {}
        if self.file_name is not None:
            keys["quantize.imatrix.file"] = Value.string(self.file_name)
        if self.datasets:
            keys["quantize.imatrix.dataset"] = Value.string(_base_name(self.datasets[0]))
        keys["quantize.imatrix.entries_count"] = Value.u32(len(self.entries))
        if self.chunk_count > 0:
            keys["quantize.imatrix.chunks_count"] = Value.u32(self.chunk_count)
        return keys


def _base_name(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
