"""Comparing two importance matrices: what only one has, how far the weights of the rest are apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import InputError
from apex_quant.importance.imatrix import Entry, Importance


@dataclass(frozen=True)
class EntryDifference:
    """One entry in both. Tokens are those of the best covered row; `uncovered` are rows without any.

    The relative difference of two weights is |a - b| / max(a, b), between 0 and 1, over all rows that have data in
    both; `cosine` is that of those weights. None where no row has, or (cosine) all weights of one are zero.
    """

    name: str
    tokens_a: int
    tokens_b: int
    uncovered_a: int
    uncovered_b: int
    median: float | None
    max: float | None
    cosine: float | None

    @property
    def equal(self) -> bool:
        """Whether all compared weights are equal, and the same rows have data."""
        return self.max in (0.0, None) and self.uncovered_a == self.uncovered_b


@dataclass(frozen=True)
class Comparison:
    """All of it; `entries` holds every common entry, the most different first (by cosine, then by median)."""

    a: str
    b: str
    chunks_a: int
    chunks_b: int
    prior_a: str | None
    prior_b: str | None
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    other_shape: tuple[str, ...]
    entries: tuple[EntryDifference, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            **{key: value for key, value in asdict(self).items() if key != "entries"},
            "entries_equal": sum(entry.equal for entry in self.entries),
            "entries": [asdict(entry) for entry in self.entries],
        }


def compare(a: str | Path | Importance, b: str | Path | Importance) -> Comparison:
    """The differences of two matrices. Raises InputError when a file cannot be read."""
    if not isinstance(a, Importance):
        with Importance.read(a) as read:
            return compare(read, b)
    if not isinstance(b, Importance):
        with Importance.read(b) as read:
            return compare(a, read)
    common = [name for name in a.entries if name in b.entries]
    fitting = [name for name in common if a.entries[name].size == b.entries[name].size]
    found = [_difference(name, a.entries[name], b.entries[name]) for name in fitting]
    found.sort(key=lambda d: (2.0 if d.cosine is None else d.cosine, -(d.median or 0), d.name))
    return Comparison(
        a=a.file_name or "a",
        b=b.file_name or "b",
        chunks_a=a.chunk_count,
        chunks_b=b.chunk_count,
        prior_a=a.prior,
        prior_b=b.prior,
        only_a=tuple(name for name in a.entries if name not in b.entries),
        only_b=tuple(name for name in b.entries if name not in a.entries),
        other_shape=tuple(name for name in common if name not in fitting),
        entries=tuple(found),
    )


def _difference(name: str, a: Entry, b: Entry) -> EntryDifference:
    both = _covered(a) & _covered(b)  # a .dat file has one row where a GGUF file has one for each expert
    x = a.weights().reshape(-1)[both].astype(np.float64)
    y = b.weights().reshape(-1)[both].astype(np.float64)
    median = largest = cosine = None
    if x.size:
        top = np.maximum(x, y)
        relative = np.divide(np.abs(x - y), top, out=np.zeros_like(top), where=top > 0)
        median, largest = float(np.median(relative)), float(relative.max())
        norm = float(np.linalg.norm(x)) * float(np.linalg.norm(y))
        cosine = min(1.0, float(x @ y) / norm) if norm > 0 else None
    if cosine is not None and not np.isfinite(cosine):
        raise InputError(f"{name}: the weights are too large to compare")
    return EntryDifference(
        name=name,
        tokens_a=int(a.counts.max()),
        tokens_b=int(b.counts.max()),
        uncovered_a=int((a.counts == 0).sum()),
        uncovered_b=int((b.counts == 0).sum()),
        median=median,
        max=largest,
        cosine=cosine,
    )


def _covered(entry: Entry) -> NDArray[np.bool_]:
    return np.repeat(entry.counts > 0, entry.n_in)
