"""What an importance matrix holds: entries, tokens, and how well calibration reached the experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apex_quant.importance.fill import is_expert
from apex_quant.importance.imatrix import Importance
from apex_quant.model import classify

FLOOR = 64
"""Tokens under which an expert counts as thinly covered."""


@dataclass(frozen=True)
class EntryReport:
    """One entry: `experts` is 0 where rows are no experts; `uncovered` experts have no tokens, `thin` few."""

    name: str
    layer: int | None
    channels: int
    experts: int
    tokens_min: int
    tokens_median: float
    tokens_max: int
    uncovered: tuple[int, ...]
    thin: tuple[int, ...]


@dataclass(frozen=True)
class ImportanceReport:
    """A matrix at a glance."""

    path: str
    form: str
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    prior: str | None
    metadata: dict[str, str]
    extras: tuple[str, ...]
    ignored: tuple[str, ...]
    floor: int
    entries: tuple[EntryReport, ...]

    def by_layer(self, kind: str) -> list[dict[str, Any]]:
        """[{"layer", "experts"}] with `kind` 'uncovered' or 'thin' in any tensor of the layer."""
        layers: dict[int | None, set[int]] = {}
        for entry in self.entries:
            layers.setdefault(entry.layer, set()).update(getattr(entry, kind))
        found = [(layer, experts) for layer, experts in layers.items() if experts]
        return [{"layer": layer, "experts": sorted(e)} for layer, e in sorted(found, key=lambda row: row[0] or 0)]

    def to_json(self) -> dict[str, Any]:
        whole = asdict(self)
        entries = whole.pop("entries")
        experts = {kind: self.by_layer(kind) for kind in ("uncovered", "thin")}
        return {**whole, "experts": experts, "entries": entries}


def report(importance: Importance, path: str | Path = "", *, floor: int = FLOOR) -> ImportanceReport:
    """What `apex imatrix show` shows; reads no sums."""
    return ImportanceReport(
        path=str(path or importance.file_name or ""),
        form="dat" if importance.legacy else "gguf",
        datasets=importance.datasets,
        chunk_count=importance.chunk_count,
        chunk_size=importance.chunk_size,
        prior=importance.prior,
        metadata={key: str(value) for key, value in importance.metadata.items()},
        extras=tuple(importance.extras),
        ignored=importance.ignored,
        floor=floor,
        entries=tuple(_entries(importance, floor)),
    )


def _entries(importance: Importance, floor: int) -> Iterable[EntryReport]:
    for name, entry in importance.entries.items():
        counts = entry.counts
        experts = is_expert(name, entry)
        yield EntryReport(
            name=name,
            layer=classify(name, (entry.n_in, 1, entry.n_mat), "").layer,
            channels=entry.n_in,
            experts=entry.n_mat if experts else 0,
            tokens_min=int(counts.min()),
            tokens_median=float(np.median(counts)),
            tokens_max=int(counts.max()),
            uncovered=tuple(np.flatnonzero(counts == 0).tolist()) if experts else (),
            thin=tuple(np.flatnonzero((counts > 0) & (counts < floor)).tolist()) if experts else (),
        )
