"""What a long job on a session keeps on disk, so that a kill costs seconds: one file, replaced whole.

A NumPy archive with one JSON entry that says what it belongs to (`spec`: models, text and options) and how far it is.
One that belongs to something else, or is broken, counts as none.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from apex_quant.gguf.atomic import write_file

_ABOUT: Final = "about"


@dataclass
class Kept:
    """The common part; a job's own class adds fields, which JSON has to be able to say."""

    spec: str
    finished: bool = False
    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Replace the file by this. Raises ResourceError."""
        about = {key: value for key, value in vars(self).items() if key != "arrays"}
        buffer = io.BytesIO()
        encoded = np.frombuffer(json.dumps(about).encode(), np.uint8)
        np.savez(buffer, allow_pickle=False, **{_ABOUT: encoded}, **self.arrays)
        write_file(path, buffer.getbuffer())

    @classmethod
    def load(cls, path: Path, spec: str) -> Self | None:
        """What is kept of the job `spec`, or None."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            about = json.loads(arrays.pop(_ABOUT).tobytes())
            kept = cls(**about, arrays=arrays)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None
        return kept if kept.spec == spec else None
