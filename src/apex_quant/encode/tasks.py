"""What the executor is told: which bytes of the source become which bytes of which files.

Plain data, so that it can cross into the child process and be tested without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from apex_quant.gguf import TYPES, GGMLType

# Weights handed to a thread at once: 1 MiB of float32. Measured for nine tiers on 2 threads: 2^16, or items of equal
# work (20 ms), cost about 6 % more processor time on a machine with some noise. By the costs below the last item of
# nine tiers keeps a thread waiting for up to 0.7 s.
ITEM_WEIGHTS = 1 << 18

# Nanoseconds per weight and thread, measured on the development machine (benchmarks/encode.py --types). Used for
# the estimate of the time left and nothing else, so only the ratios matter.
_COST = {
    "Q8_0": 4.0, "Q4_0": 12.0, "Q4_1": 12.0, "Q5_0": 14.0, "Q5_1": 14.0,
    "Q2_K": 170.0, "Q3_K": 190.0, "Q4_K": 170.0, "Q5_K": 190.0, "Q6_K": 120.0,
    "IQ4_NL": 300.0, "IQ4_XS": 350.0, "IQ3_S": 450.0, "IQ3_XXS": 500.0,
    "IQ2_S": 350.0, "IQ2_XS": 1000.0, "IQ2_XXS": 600.0, "IQ1_S": 500.0, "IQ1_M": 250.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Write:
    """One encoding of a tensor and all places it goes to: (index into the files, byte offset)."""

    kind: str
    importance: bool
    places: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Task:
    """One source tensor, read once. `shape` is in ggml order (row length first)."""

    name: str
    shape: tuple[int, ...]
    kind: str
    writes: list[Write]

    @property
    def source_type(self) -> GGMLType:
        return TYPES[self.kind]

    @property
    def row_length(self) -> int:
        return self.shape[0]

    @property
    def rows_per_slice(self) -> int:
        """Rows that share one importance row: the second dimension, as in llama-quantize."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def rows(self) -> int:
        rows = 1
        for n in self.shape[1:]:
            rows *= n
        return rows

    @property
    def work(self) -> float:
        """Estimated nanoseconds of one thread."""
        weights = self.rows * self.row_length
        return weights * (2.0 + sum(_COST.get(w.kind, 5.0) for w in self.writes if w.kind != self.kind))

    @property
    def item_rows(self) -> int:
        """Rows of one item (the last may have fewer)."""
        return min(self.rows, max(1, ITEM_WEIGHTS // self.row_length))

    @property
    def n_items(self) -> int:
        return -(-self.rows // self.item_rows)

    def items(self) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of the parts handed to threads, in order."""
        step = self.item_rows
        for first in range(0, self.rows, step):
            yield first, min(step, self.rows - first)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Task:
        writes = [Write(w["kind"], w["importance"], [(p[0], p[1]) for p in w["places"]]) for w in data["writes"]]
        return cls(**{**data, "shape": tuple(data["shape"]), "writes": writes})


def uses_importance(kind: GGMLType) -> bool:
    """Whether the encoder's bytes depend on the importance (Q8_0, the floats and a few others ignore it)."""
    return kind.imatrix != "unused"
