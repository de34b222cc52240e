"""Where encoded rows go: into a partial file, or against a finished one to see whether they are the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from apex_quant.errors import InputError, ResourceError

Bytes = npt.NDArray[np.uint8]


class Sink(Protocol):
    """One file; `write` is called from several threads for ranges that do not overlap."""

    def write(self, data: Bytes, offset: int) -> None: ...

    def sync(self) -> None:
        """Return when everything written so far survives a power cut."""


class PartialFile:
    """A partial file that the parent opened and locked; the descriptor is shared, and with it the lock."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd, self._name = fd, name

    def write(self, data: Bytes, offset: int) -> None:
        view = data.data
        with self._named_errors():
            while view:
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count

    def sync(self) -> None:
        with self._named_errors():
            os.fdatasync(self._fd)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"{self._name}: cannot be written: {error.strerror}",
                hint="free some space and repeat the command: it goes on from where it stopped",
            ) from None


class Comparison:
    """Compares instead of writing. `differences` are (offset, bytes that differ, bytes compared) of unequal ranges."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd, self._name = fd, name
        self._lock = threading.Lock()
        self.differences: list[tuple[int, int, int]] = []

    def write(self, data: Bytes, offset: int) -> None:
        found = os.pread(self._fd, data.nbytes, offset)
        if len(found) != data.nbytes:
            raise InputError(f"{self._name}: shorter than it was when it was opened")
        unequal = np.flatnonzero(np.frombuffer(found, np.uint8) != data.reshape(-1))
        if unequal.size:
            with self._lock:
                self.differences.append((offset + int(unequal[0]), int(unequal.size), data.nbytes))

    def sync(self) -> None:
        pass
