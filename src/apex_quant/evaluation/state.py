"""Per-token numbers on disk while a metric is measured: one file beside the results, so that a kill costs seconds.

A NumPy archive with one JSON entry that says what it belongs to (`spec`: models, text and options) and how far it is.
One that belongs to something else, or is broken, counts as none.
"""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apex_quant.errors import BusyError
from apex_quant.gguf.writer import AtomicFile

_ABOUT = "about"
# How long a new run waits for the child of a killed one to notice and end: it decodes the batch in hand first.
_BUSY_SECONDS = 30.0


@dataclass
class State:
    """`done` chunks of all are measured; `facts` are what the results need besides numbers."""

    spec: str
    done: int = 0
    finished: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


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
    """The state of the measurement `spec`, or None."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        about = json.loads(arrays.pop(_ABOUT).tobytes())
        state = State(**about, arrays=arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return state if state.spec == spec else None


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Hold the output for one run; gives the lock's descriptor, with which a child holds it too. Death releases it.

    Raises BusyError while another process evaluates into the same file.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            lock = AtomicFile(out.with_name(out.name + ".evaluation"))  # never completed: it has nothing in it
            break
        except BusyError:
            if time.monotonic() >= deadline:
                raise BusyError(
                    f"{out}: another process is evaluating into it", hint="wait for it, or choose another -o"
                ) from None
            time.sleep(0.1)
    try:
        yield lock.fileno()
    finally:
        lock.abandon()
