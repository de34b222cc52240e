"""Looking at files from the outside."""

from __future__ import annotations

import hashlib
from pathlib import Path

from apex_quant.gguf import open_model


def data_section(path: Path) -> str:
    """sha256 of everything after the header."""
    with open_model(path) as model:
        start = model.files[0].header_bytes
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.file_digest(file, "sha256").hexdigest()
