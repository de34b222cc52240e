"""Files that appear only when they are whole, written by one process at a time; and locks made of them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from apex_quant.errors import BusyError, ResourceError

BUSY_SECONDS: Final = 30.0
"""How long a new run waits for the child of a killed one to notice and end: it finishes the batch in hand first."""
_PAUSE: Final = 0.05  # seconds between two tries
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def write_file(path: str | os.PathLike[str], data: bytes | bytearray | memoryview | str) -> Path:
    """Replace a file, whole or not at all; text as UTF-8. Raises ResourceError, BusyError while another writes it."""
    with AtomicFile(path) as file:
        file.pwrite(data.encode() if isinstance(data, str) else data, 0)
    return file.target


@contextmanager
def locked(out: Path, work: str, doing: str) -> Iterator[int]:
    """Hold the output for one run, by a file beside it that is named after the `work` and has nothing in it; gives the
    lock's descriptor, with which a child holds it too. Death releases it.

    Raises BusyError, which says what another process is `doing`.
    """
    try:
        lock = AtomicFile.when_free(out.with_name(f"{out.name}.{work}"))
    except BusyError:
        raise BusyError(f"{out}: another process is {doing}", hint="wait for it, or choose another -o") from None
    try:
        yield lock.fileno()
    finally:
        lock.abandon()


class AtomicFile:
    """Writes `target` under the name target + '.partial' and renames it when it is complete and on disk.

    One writer at a time: a second one on the same target gets a BusyError. With resume=True an existing partial file
    is continued, else it starts empty. A full disk, a quota or a size limit is a ResourceError. As a context manager
    it is completed at the end of the block, and abandoned when that raises.
    """

    def __init__(self, target: str | os.PathLike[str], *, resume: bool = False) -> None:
        self.target = Path(target)
        self.partial = self.target.with_name(self.target.name + ".partial")
        self._fd = -1
        try:
            fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise self._failed("opened", error) from None
        try:
            _lock(fd)
            # a writer that ended in between may have renamed what was opened: that file is its, not ours
            if os.fstat(fd).st_ino != self.partial.stat().st_ino:
                raise BlockingIOError(errno.EWOULDBLOCK, "busy")
            if not resume:
                os.ftruncate(fd, 0)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.ENOENT):
                raise BusyError(f"{self.partial}: another process is writing it") from None
            raise self._failed("opened", error) from None
        self._fd = fd

    @classmethod
    def when_free(cls, target: str | os.PathLike[str], *, resume: bool = False) -> Self:
        """As the constructor, after BUSY_SECONDS of patience with another writer. Raises BusyError then."""
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                return cls(target, resume=resume)
            except BusyError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_PAUSE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.is_open:
                self.commit()
        finally:
            self.abandon()

    def _failed(self, what: str, error: OSError) -> ResourceError:
        hint = "free some space, or raise the quota or file size limit" if error.errno in _FULL else None
        return ResourceError(f"{self.partial}: cannot be {what}: {error.strerror}", hint)

    @property
    def is_open(self) -> bool:
        """Whether it is neither committed, abandoned nor closed."""
        return self._fd >= 0

    def fileno(self) -> int:
        """The descriptor; a child process that inherits it shares the lock."""
        return self._fd

    @property
    def size(self) -> int:
        """Bytes the partial file has now."""
        return os.fstat(self._fd).st_size

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Writes all of `data` at `offset`."""
        view = memoryview(data).cast("B")
        try:
            while view:
                done = os.pwrite(self._fd, view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise self._failed("written", error) from None

    def pread(self, size: int, offset: int) -> bytes:
        """Reads back up to `size` bytes, to hash what was written."""
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise self._failed("read", error) from None

    def truncate(self, size: int) -> None:
        """Sets the size; what was never written reads as zeros."""
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise self._failed("resized", error) from None

    def sync(self) -> None:
        """Returns when all data written so far is on disk."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed("flushed", error) from None

    def commit(self) -> None:
        """Flushes, gives the file its final name (replacing any old one) and flushes the folder.

        When that fails the partial file stays open, to be abandoned or closed.
        """
        try:
            os.fsync(self._fd)
            self.partial.replace(self.target)
        except OSError as error:
            raise self._failed("completed", error) from None
        self.close()
        _sync_folder(self.target.parent)

    def abandon(self) -> None:
        """Closes and deletes the partial file."""
        if self._fd >= 0:
            self.partial.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Closes without renaming; the partial file stays, to be resumed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def require_space(target: str | os.PathLike[str], needed: int) -> None:
    """ResourceError when the file system of `target` has less than `needed` bytes free."""
    folder = Path(target).absolute().parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ResourceError(f"{folder}: {error.strerror}", hint="the output folder must exist") from None
    if free < needed:
        raise ResourceError(
            f"{folder}: {needed} bytes needed, {free} free", hint="free some space or choose another folder"
        )


def _lock(fd: int) -> None:
    """BlockingIOError when another process holds the file. Some network file systems have no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise ResourceError(f"{folder}: cannot be flushed: {error.strerror}") from None
    finally:
        os.close(fd)
