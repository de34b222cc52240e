"""Per-token numbers on disk while a metric is measured, and the lock of the results."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from apex_quant.gguf import atomic
from apex_quant.runtime.kept import Kept


@dataclass
class State(Kept):
    """`done` chunks of all are measured; `facts` are what the results need besides numbers."""

    done: int = 0


def locked(out: Path) -> AbstractContextManager[int]:
    """Hold the output for one evaluation (atomic.locked)."""
    return atomic.locked(out, "evaluation", "evaluating into it")
