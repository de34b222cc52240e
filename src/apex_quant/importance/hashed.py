"""A file written from start to end, hashed on the way, that appears whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apex_quant.gguf.atomic import AtomicFile


class HashedFile:
    """Where `hashed_file` writes; `sha256` is that of everything put so far."""

    def __init__(self, file: AtomicFile) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._at = 0

    def put(self, data: bytes, offset: int | None = None) -> None:
        """Append `data`; with `offset`, after zeros up to there."""
        gap = 0 if offset is None else offset - self._at
        for part in (bytes(gap), data):
            self._file.pwrite(part, self._at)
            self._hash.update(part)
            self._at += len(part)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@contextmanager
def hashed_file(path: Path) -> Iterator[HashedFile]:
    """Write `path` in the body of a with statement; an exception there leaves no file behind."""
    with AtomicFile(path) as file:
        yield HashedFile(file)
