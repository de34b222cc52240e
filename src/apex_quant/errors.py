"""Every error a user can meet, with the exit code the command line gives it.

The message says what was wrong and where; the hint says what to do about it.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class ApexError(Exception):
    """Base of all errors raised on purpose. `exit_code` 5 means an internal failure."""

    exit_code: ClassVar[int] = 5

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ApexError):
    """Options that contradict each other or name something that does not exist."""

    exit_code = 2


class InputError(ApexError):
    """A file that is broken, unsuitable or not what it claims to be."""

    exit_code = 3


class GGUFError(InputError):
    """A GGUF file that breaks the format: names the file, the byte offset and the field."""

    def __init__(self, message: str, path: str | Path, offset: int | None = None, field: str | None = None) -> None:
        where = f"{path}"
        if offset is not None:
            where += f" at byte {offset}"
        if field is not None:
            where += f" ({field})"
        super().__init__(f"{where}: {message}")
        self.path = Path(path)
        self.offset = offset
        self.field = field


class ResourceError(ApexError):
    """Something the machine lacks: disk, memory, network, a library or a feature of it."""

    exit_code = 4


class BusyError(ResourceError):
    """Another process is working on the same file."""


class NativeError(ApexError):
    """The native library failed or ended its process. Carries its last log lines, and the number of the signal that
    ended the process, None where it ended by itself."""

    def __init__(self, message: str, log_tail: str = "", hint: str | None = None, *, signal: int | None = None) -> None:
        super().__init__(message, hint)
        self.log_tail = log_tail
        self.signal = signal


def did_you_mean(word: str, known: list[str]) -> str:
    """A trailing ' Did you mean X?' for messages, or '' when nothing is close."""
    import difflib

    folded = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), list(folded), n=1, cutoff=0.5)
    return f" Did you mean {folded[close[0]]}?" if close else ""
