"""What the library says: its last lines, for messages, and everything to standard error, for the parent."""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LINES = 60
_WARN = 3  # GGML_LOG_LEVEL_WARN; 4 is ERROR, 5 continues the line before


class LibraryLog:
    """Installed once for the process; `last_problem` is what a failure most likely was about."""

    def __init__(self, lib: Any) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=_LINES)
        self._recorders: list[list[str]] = []
        self._level = 0
        self._callback = lib.llama_log_callback(self._take)  # kept: the library calls it until the end
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, _: int | None) -> None:
        os.write(2, text)
        line = text.decode("utf-8", "replace").strip()
        self._level = level if level != 5 else self._level
        if line.strip("."):
            self._lines.append((self._level, line))
            for recorder in self._recorders:
                recorder.append(line)

    @contextmanager
    def recorded(self) -> Iterator[list[str]]:
        """A list that gets every line said inside, of whatever level."""
        lines: list[str] = []
        self._recorders.append(lines)
        try:
            yield lines
        finally:
            self._recorders.remove(lines)

    def last_problem(self) -> str:
        """The first line of the last run of warnings and errors, or the last line of any kind."""
        bad = [line for level, line in self._lines if level >= _WARN]
        return bad[-1] if bad else self._lines[-1][1] if self._lines else "nothing was said"

    def problems(self) -> list[str]:
        """All warnings and errors kept."""
        return [line for level, line in self._lines if level >= _WARN]
