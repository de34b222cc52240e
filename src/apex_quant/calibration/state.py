"""Sums on disk while a calibration runs: one file beside the output, replaced whole, so that a kill costs minutes.

The file is a NumPy archive with one JSON entry that says what it belongs to (`spec`: model, text and options) and how
far it is. One that belongs to something else, or is broken, counts as none.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.gguf.writer import AtomicFile

Piece = list[Any]  # of text: [the text, whether marks such as <|im_start|> are tokens in it, its kind]

_ABOUT = "about"


@dataclass
class State:
    """How far a calibration is: `batches` of the text asked for, then `draws` of further text by kind."""

    spec: str
    batches: int = 0
    draws: list[str] = field(default_factory=list)
    chunks: int = 0
    finished: bool = False
    shared: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


def sums_path(out: Path) -> Path:
    """Where the sums of an unfinished output are."""
    return out.with_name(out.name + ".sums")


def save(path: Path, state: State) -> None:
    """Replace the file by this state. Raises ResourceError."""
    about = {key: value for key, value in vars(state).items() if key != "arrays"}
    buffer = io.BytesIO()
    encoded = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(buffer, allow_pickle=False, **{_ABOUT: encoded}, **state.arrays)
    file = AtomicFile(path)
    try:
        file.pwrite(buffer.getbuffer(), 0)
        file.commit()
    except BaseException:
        file.abandon()
        raise


def load(path: Path, spec: str) -> State | None:
    """The state of the calibration `spec`, or None."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        about = json.loads(arrays.pop(_ABOUT).tobytes())
        state = State(**about, arrays=arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return state if state.spec == spec else None
