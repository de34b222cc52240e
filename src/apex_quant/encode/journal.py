"""The journal beside an output: what is already on disk, so that the same command goes on from there.

JSON lines. The first says what is being made (a hash of everything that decides the bytes), then one line for each
tensor that is durable, then one when the file is complete. A line torn by a crash is ignored. Paths, times and the
command stand here and not in the output, which must be equal between equal runs.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from apex_quant.errors import ResourceError

FORMAT = 1
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


class Journal:
    """One output's journal, open for appending. Read with `load`, begun anew with `begin`."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(target.name + ".journal")
        self.spec: str | None = None
        self.tensors: dict[str, str] = {}
        self.finished: dict[str, Any] | None = None
        self.seconds = 0.0
        self.shared = False  # written by other machines, which may not have noticed yet that they should stop
        self._whole = 0

    def load(self) -> None:
        """Read what an earlier run left, up to the first line that is torn or not ours."""
        self.spec, self.tensors, self.finished, self.seconds, self._whole = None, {}, None, 0.0, 0
        self.shared = False
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was torn
        except OSError:
            return
        for line in lines:
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                return
            self._whole += len(line) + 1

    def _take(self, entry: dict[str, Any]) -> None:
        """One line. KeyError, TypeError or ValueError when it is not of the form we write."""
        if self.spec is None:
            if entry["apex_journal"] != FORMAT:
                raise ValueError
            self.spec, self.shared = str(entry["spec"]), bool(entry.get("shared", False))
        elif "shared" in entry:
            self.shared = True
        elif "tensor" in entry:
            name, digest, seconds = str(entry["tensor"]), str(entry["sha256"]), float(entry["seconds"])
            self.tensors[name] = digest
            self.seconds += seconds
        else:
            for file in entry["files"]:
                _ = str(file["path"]), int(file["bytes"]), int(file["mtime_ns"])
            self.finished = {**entry, "data_sha256": str(entry["data_sha256"])}

    def begin(self, spec: str, about: dict[str, Any]) -> None:
        """Start over with this specification."""
        self.spec, self.tensors, self.finished, self.seconds = spec, {}, None, 0.0
        self.shared = bool(about.get("shared", False))
        # emptied in place and not replaced: an old journal must not come back after a power cut
        self._append([{"apex_journal": FORMAT, "spec": spec, "started": _now(), **about}], os.O_TRUNC)

    def repair(self) -> None:
        """Cut off what `load` could not read, so that the next line is read again."""
        try:
            os.truncate(self.path, self._whole)
        except OSError as error:
            raise ResourceError(f"{self.path}: cannot be repaired: {error.strerror}") from None

    def share(self) -> None:
        """Record that other machines write from now on, before they do."""
        if not self.shared:
            self.shared = True
            self._append([{"shared": True}])

    def add(self, tensors: list[tuple[str, str, float]]) -> None:
        """Record (name, sha256 of the source bytes, thread seconds) of tensors whose data is on disk."""
        for name, digest, seconds in tensors:
            self.tensors[name] = digest
            self.seconds += seconds
        self._append([{"tensor": n, "sha256": d, "seconds": round(s, 4)} for n, d, s in tensors])

    def finish(self, files: list[dict[str, Any]], data_sha256: str) -> None:
        """Record that the output is complete under its final name."""
        self.finished = {"finished": _now(), "files": files, "data_sha256": data_sha256}
        self._append([self.finished])

    def _append(self, entries: list[dict[str, Any]], flags: int = 0) -> None:
        data = b"".join(json.dumps(entry, sort_keys=True).encode() + b"\n" for entry in entries)
        try:
            fd = os.open(self.path, _APPEND | flags, 0o666)
            try:
                while data:
                    data = data[os.write(fd, data) :]
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot be written: {error.strerror}", hint="finished work is kept; free some space"
            ) from None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
