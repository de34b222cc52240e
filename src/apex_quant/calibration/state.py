"""Sums on disk while a calibration runs, and the lock of its output."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apex_quant.gguf import atomic
from apex_quant.runtime.kept import Kept

Piece = list[Any]  # of text: [the text, whether marks such as <|im_start|> are tokens in it, its kind]


@dataclass
class State(Kept):
    """How far a calibration is: `batches` of the text asked for, then `draws` of further text by kind."""

    batches: int = 0
    draws: list[str] = field(default_factory=list)
    chunks: int = 0
    shared: dict[str, str] = field(default_factory=dict)


def sums_path(out: Path) -> Path:
    """Where the sums of an unfinished output are."""
    return out.with_name(out.name + ".sums")


def locked(out: Path) -> AbstractContextManager[int]:
    """Hold the output for one calibration (atomic.locked)."""
    return atomic.locked(out, "calibration", "calibrating into it")
