"""What a run knows of earlier runs: WORK/state.json, content hashes, and the lock that keeps two runs apart.

The state is one JSON document, replaced whole. A record stands for one item of a phase (a tier of `quantize`, the
whole of `calibrate`): what decided it, the files it made with their sha256, and seconds. An item that was begun and
not finished is in `started`, so that the next run either goes on with it or clears its files away first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from apex_quant.errors import BusyError, InputError, ResourceError, UsageError
from apex_quant.gguf import write_file

STATE: Final = "state.json"
LOCK: Final = "run.lock"
FORMAT: Final = 1
_MOST_BYTES: Final = 64 << 20
_BLOCK: Final = 4 << 20
_NO_LOCKS: Final = (38, 95)  # ENOSYS, EOPNOTSUPP: some network file systems have none


@dataclass
class StoredFile:
    """A file that an item made: path relative to WORK where it lies in there, size, sha256 of its bytes."""

    path: str
    bytes: int
    sha256: str


@dataclass
class Record:
    """A finished item. `key` is the hash of `parameters` and `inputs`; `claims` are names below WORK that are its own
    to delete. `released` means that its files were deleted to save space: they count as present until a phase reads
    them."""

    key: str
    parameters: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, list[StoredFile]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    finished: str = ""
    claims: list[str] = field(default_factory=list)
    released: bool = False


@dataclass
class Started:
    """An item in hand: its key, what it will write, seconds that interrupted runs spent on it, and what is known of its
    files once they are whole."""

    key: str
    claims: list[str]
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def key_of(parameters: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """One hash of everything that decides an item."""
    return hashlib.sha256(json.dumps([parameters, inputs], sort_keys=True).encode()).hexdigest()


def digest_of(parts: Iterable[str]) -> str:
    """One hash of several, in their order; of a single one that one."""
    every = list(parts)
    return every[0] if len(every) == 1 else hashlib.sha256("\n".join(every).encode()).hexdigest()


def located(path: Path) -> Path:
    """Absolute, by the folder that it lies in: `..` and links to folders are followed, a link to a file stays."""
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def is_folder(work: Path) -> bool:
    """Whether WORK is there. Raises UsageError where a file has its place, or that of a folder above it."""
    for place in (work, *work.parents):
        with suppress(OSError):  # what may not even be looked at is told of by whoever uses it
            if place.is_dir():
                return place == work
            if place.exists():
                raise UsageError(f"{place}: is a file, not a folder", hint="--work names the folder of the run")
    return False


class State:
    """The document of one WORK folder; `work` is its real place, however it was named."""

    def __init__(self, work: Path) -> None:
        self.work = work.resolve()
        self.path = self.work / STATE
        self.records: dict[str, dict[str, Record]] = {}
        self.started: dict[str, dict[str, Started]] = {}
        self.hashes: dict[str, list[Any]] = {}
        self.about: dict[str, Any] = {}

    def load(self) -> State:
        """Read it, when there is one. Raises InputError for a file that is not ours or of a newer version."""
        try:
            if self.path.stat().st_size > _MOST_BYTES:
                raise InputError(f"{self.path}: larger than {_MOST_BYTES >> 20} MiB: not the state of a run")
            document = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return self
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise InputError(
                f"{self.path}: not the state of a run", hint="delete it: everything is made again then"
            ) from None
        if not isinstance(document, dict) or document.get("apex_run") != FORMAT:
            raise InputError(
                f"{self.path}: of another version of apex run", hint="use that version, or another --work folder"
            )
        try:
            self.records = {
                phase: {name: _record(one) for name, one in items.items()}
                for phase, items in document["phases"].items()
            }
            self.started = {
                phase: {
                    name: Started(
                        str(one["key"]),
                        [str(path) for path in one["claims"]],
                        float(one["seconds"]),
                        dict(one.get("facts", {})),
                    )
                    for name, one in items.items()
                }
                for phase, items in document["started"].items()
            }
            self.hashes = {str(path): list(entry) for path, entry in document["hashes"].items() if len(entry) == 4}
            self.about = dict(document["about"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{self.path}: damaged: {error!r}", hint="delete it: everything is made again then"
            ) from None
        return self

    def save(self) -> None:
        """Replace the file; it is on disk when this returns. Raises ResourceError."""
        document = {
            "apex_run": FORMAT,
            "about": self.about,
            "phases": {phase: {n: asdict(one) for n, one in items.items()} for phase, items in self.records.items()},
            "started": {p: {n: asdict(one) for n, one in items.items()} for p, items in self.started.items() if items},
            "hashes": self.hashes,
        }
        write_file(self.path, json.dumps(document, indent=1, sort_keys=True) + "\n")

    def record(self, phase: str, item: str) -> Record | None:
        return self.records.get(phase, {}).get(item)

    # --- files ---

    def relative(self, path: Path) -> str:
        """As it stands in the state: below WORK relative, so that the folder may be moved."""
        absolute = located(path)
        return str(absolute.relative_to(self.work)) if absolute.is_relative_to(self.work) else str(absolute)

    def sha256(self, path: Path) -> str:
        """Of a file's bytes; read again only when its size, time or inode differ from when it was read last.

        Raises InputError when it cannot be read.
        """
        name = self.relative(path)
        try:
            status = path.stat()
            seen = [status.st_size, status.st_mtime_ns, status.st_ino]
            if (known := self._known(name, seen)) is not None:
                return known
            digest = hashlib.sha256()
            with path.open("rb") as data:
                while part := data.read(_BLOCK):
                    digest.update(part)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        self.hashes[name] = [*seen, digest.hexdigest()]
        return digest.hexdigest()

    def _known(self, name: str, seen: list[int]) -> str | None:
        known = self.hashes.get(name)
        return str(known[3]) if known is not None and known[:3] == seen else None

    def unread(self, paths: Iterable[Path]) -> int:
        """Bytes that sha256() would read of these files."""
        total = 0
        for path in paths:
            with suppress(OSError):  # sha256() says so
                status = path.stat()
                seen = [status.st_size, status.st_mtime_ns, status.st_ino]
                total += 0 if self._known(self.relative(path), seen) else status.st_size
        return total

    def seed(self, path: Path, sha256: str) -> None:
        """Take a hash that somebody else has just verified."""
        status = path.stat()
        self.hashes[self.relative(path)] = [status.st_size, status.st_mtime_ns, status.st_ino, sha256]

    def forget(self, path: Path) -> None:
        self.hashes.pop(self.relative(path), None)

    def prune(self) -> None:
        """Forget the hashes of files that are gone."""
        self.hashes = {name: entry for name, entry in self.hashes.items() if (self.work / name).exists()}

    def digest(self, paths: Sequence[Path]) -> str:
        """Of several files in their order (shards, a checkpoint's folder); of one its sha256."""
        return digest_of(self.sha256(path) for path in paths)

    def stored(self, path: Path) -> StoredFile:
        return StoredFile(self.relative(path), path.stat().st_size, self.sha256(path))

    def where(self, file: StoredFile) -> Path:
        return self.work / file.path  # an absolute path stays what it is

    def missing(self, record: Record) -> list[Path]:
        """Files of a record that are gone."""
        paths = [self.where(file) for files in record.outputs.values() for file in files]
        return [path for path in paths if not path.exists()]

    def damage(self, record: Record) -> str | None:
        """Which file of a record is gone or another one, in words; None when all are what they were."""
        for files in record.outputs.values():
            for file in files:
                path = self.where(file)
                try:
                    size = path.stat().st_size
                except OSError:
                    return f"{file.path} is gone"
                if size != file.bytes or self.sha256(path) != file.sha256:
                    return f"{file.path} was changed"
        return None


def _record(one: Mapping[str, Any]) -> Record:
    outputs = {
        str(label): [StoredFile(str(f["path"]), int(f["bytes"]), str(f["sha256"])) for f in files]
        for label, files in one["outputs"].items()
    }
    return Record(**{**one, "outputs": outputs})


@contextmanager
def exclusive(work: Path, say: Callable[[str], None] = lambda note: None) -> Iterator[None]:
    """Hold the folder for one run; death releases it. Where the file system has no locks nothing holds it, and `say`
    gets a line. Raises BusyError at once when another run has it."""
    path = work / LOCK
    try:
        work.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be made: {error.strerror}") from None
    try:
        try:
            _lock(fd)
        except BlockingIOError:
            said = os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "unknown"
            raise BusyError(
                f"{work}: another apex run is working there (process {said})",
                hint="wait for it (apex status shows how far it is), or choose another --work",
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise ResourceError(f"{path}: cannot be locked: {error.strerror}") from None
            say(f"{work}: this file system has no locks: nothing keeps a second run out of the folder")
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} since {now()}\n".encode(), 0)
        yield
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    """BlockingIOError when another run holds it; `apex status` only touches it for an instant."""
    for last in (False, False, True):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if last:
                raise
            time.sleep(0.02)
        else:
            return


def busy(work: Path) -> str | None:
    """The process that works in a folder now, in words, or None."""
    try:
        fd = os.open(work / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return os.pread(fd, 200, 0).decode("utf-8", "replace").strip() or "unknown"
    except OSError:
        return None
    finally:
        os.close(fd)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
