"""What the executor is told: which bytes of the source become which bytes of which files.

Plain data, so that it can cross into the child process and be tested without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from apex_quant.gguf import TYPES, GGMLType

# Weights handed to a thread at once. Every item costs some Python, which one thread can run at a time: on 16 threads
# items of 2^15, 2^16, 2^17, 2^18 weights took 1.20, 1.13, 1.11, 1.07 times as long as llama-quantize. Large ones leave
# threads without work at the end, so items shrink with what is left.
MOST_WEIGHTS = 1 << 20
LEAST_WEIGHTS = 1 << 16
_SHARES = 4  # an item is at most this fraction of a thread's share of what is left

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

    def item_rows(self, weights: int) -> int:
        """Rows of an item of about so many weights: at least one, at most all."""
        return min(self.rows, max(1, weights // self.row_length))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Task:
        writes = [Write(w["kind"], w["importance"], [(p[0], p[1]) for p in w["places"]]) for w in data["writes"]]
        return cls(**{**data, "shape": tuple(data["shape"]), "writes": writes})


def items(tasks: Sequence[Task], threads: int) -> Iterator[tuple[Task, int, int]]:
    """(task, first row, number of rows) of the parts handed to threads, in order (guided self-scheduling)."""
    left = sum(task.work for task in tasks)
    for task in tasks:
        work, first = task.work / task.rows, 0
        least, most = task.item_rows(LEAST_WEIGHTS), task.item_rows(MOST_WEIGHTS)
        while first < task.rows:
            fair = int(left / (_SHARES * threads * work))
            rows = min(max(least, min(most, fair)), task.rows - first)
            yield task, first, rows
            first, left = first + rows, left - work * rows


def item_bytes(tasks: Sequence[Task]) -> int:
    """Source bytes of the largest item that there can be."""
    return max((t.source_type.row_bytes(t.row_length) * t.item_rows(MOST_WEIGHTS) for t in tasks), default=0)


def uses_importance(kind: GGMLType) -> bool:
    """Whether the encoder's bytes depend on the importance (Q8_0, the floats and a few others ignore it)."""
    return kind.imatrix != "unused"
