"""One output on its way to disk: partial files with their headers, the journal, and the last steps.

A partial file has its final size and header from the start; tensors are written in place, in any order. When all
are there the reserved hash fields are filled, the file is flushed and takes its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from apex_quant.encode.hashing import Extent, Section
from apex_quant.encode.journal import Journal
from apex_quant.errors import InputError, UsageError
from apex_quant.gguf import AtomicFile, Layout, shard_name
from apex_quant.recipe.metadata import DATA_HASH, LIBRARY_COMMIT, RESERVED, SOURCE_HASH
from apex_quant.recipe.planned import Plan

_HASH_BLOCK = 8 << 20


@dataclass(frozen=True)
class WrittenFile:
    """A finished file (one shard of an output, or all of it)."""

    path: Path
    bytes: int

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, read when it is asked for: that takes 0.6 s for each GB."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.bytes, "sha256": self.sha256}


class Output:
    """A planned file being made at `target` (shards take numbered names beside it)."""

    def __init__(self, plan: Plan, target: Path, source_identity: str) -> None:
        self.plan, self.target = plan, target
        self.layouts = plan.layouts
        count = len(self.layouts)
        prefix = str(target)[: -len(".gguf")]
        self.paths = [target] if count == 1 else [Path(shard_name(prefix, i, count)) for i in range(count)]
        self.offsets: dict[str, tuple[int, int]] = {
            tensor.name: (group, self.layouts[group].offsets[tensor.name])
            for tensor, group in zip(plan.tensors, plan.groups, strict=True)
        }
        self.journal = Journal(target)
        self.files: list[AtomicFile] = []
        self.written: list[WrittenFile] | None = None
        self.found_finished = False
        self.spec = hashlib.sha256(
            b"\0".join([source_identity.encode(), *(part.header for part in self.layouts)])
        ).hexdigest()

    def look(self, *, force: bool) -> None:
        """Find out what an earlier run left; a finished output gets its `written` and needs no `open`.

        Raises UsageError when another file stands under the final name.
        """
        self.journal.load()
        made = [self._made_here(number) for number in range(len(self.paths))]
        if self.journal.finished and all(made):
            entries = self.journal.finished["files"]
            self.written = [WrittenFile(path, e["bytes"]) for path, e in zip(self.paths, entries, strict=True)]
            self.found_finished = True
            return
        for path, ours in zip(self.paths, made, strict=True):
            if path.exists() and not ours and not force:
                raise UsageError(
                    f"{path} exists and was not made by this command", hint="--force replaces it when done"
                )

    def open(self, *, force: bool, about: Mapping[str, Any]) -> None:
        """Continue an earlier run of the same specification, or begin.

        Raises UsageError as `look`, BusyError when another process is writing this output.
        """
        for path in self.paths:
            self.files.append(AtomicFile.when_free(path, resume=True))
        self.look(force=force)  # whoever held the lock until now may have gone on, or finished
        renamed = [file.size == 0 and self._made_here(number) for number, file in enumerate(self.files)]
        whole = all(
            done or file.size == part.total_bytes
            for done, file, part in zip(renamed, self.files, self.layouts, strict=True)
        )
        # a journal without any tensor may be older than the partial file's header
        if self._same and self.journal.tensors and not self.journal.finished and whole:
            self.journal.repair()
            if about.get("shared"):
                self.journal.share()
        elif self.written is None:
            self._begin(dict(about))
            return
        for file, done in zip(self.files, renamed, strict=True):
            if done or self.written is not None:
                file.abandon()

    @property
    def _same(self) -> bool:
        """Whether the journal is of this very output."""
        return self.journal.spec == self.spec

    @property
    def complete(self) -> bool:
        """Whether every tensor is on disk."""
        return self._same and all(tensor.name in self.done for tensor in self.plan.tensors)

    def _made_here(self, number: int) -> bool:
        """Whether the file under the final name is the one that the journal tells of."""
        path, part = self.paths[number], self.layouts[number]
        if not self._same or not path.is_file():
            return False
        status = path.stat()
        if self.journal.finished:
            entries = self.journal.finished["files"]
            entry = entries[number] if len(entries) == len(self.paths) else {"bytes": -1}
            if status.st_size != entry["bytes"]:
                return False
            return status.st_mtime_ns == entry["mtime_ns"] or (self._has_header(number) and self._data_unchanged)
        # killed between a rename and the journal's last line
        return self.complete and status.st_size == part.total_bytes and self._has_header(number)

    def _has_header(self, number: int) -> bool:
        path, part = self.paths[number], self.layouts[number]
        return blanked(_head(path, part), part) == part.header

    @cached_property
    def _data_unchanged(self) -> bool:
        """Whether a finished output that was touched since still has the data that the journal tells of."""
        assert self.journal.finished is not None
        return all(path.is_file() for path in self.paths) and self._data_hash() == self.journal.finished["data_sha256"]

    def _data_hash(self) -> str:
        digest = hashlib.sha256()
        for path, part in zip(self.paths, self.layouts, strict=True):
            _hash_into(digest, _present(path), part.data_start)
        return digest.hexdigest()

    def section(self, first_file: int) -> Section:
        """The data section as the child hashes it; `first_file` is the number of this output's first descriptor."""
        extents = []
        for number, part in enumerate(self.layouts):
            names = sorted((t for t in self.offsets if self.offsets[t][0] == number), key=lambda t: self.offsets[t][1])
            starts = [self.offsets[name][1] for name in names]
            ends = [*starts[1:], part.total_bytes]
            extents += [
                Extent(self._sources[name], first_file + number, start, end)
                for name, start, end in zip(names, starts, ends, strict=True)
            ]
        return Section(extents, {self._sources[name] for name in self.offsets if name not in self.done})

    @cached_property
    def _sources(self) -> dict[str, str]:
        return {tensor.name: tensor.source for tensor in self.plan.tensors}

    def _begin(self, about: dict[str, Any]) -> None:
        if self.journal.shared:  # another machine may still write other bytes into the old file: let it
            for number, path in enumerate(self.paths):
                self.files[number].abandon()
                self.files[number] = AtomicFile.when_free(path, resume=True)
        self.journal.begin(self.spec, about | {"tier": self.plan.tier, "output": str(self.target)})
        for file, part in zip(self.files, self.layouts, strict=True):
            file.truncate(0)
            file.truncate(part.total_bytes)
            file.pwrite(part.header, 0)
            file.sync()

    @property
    def done(self) -> Mapping[str, str]:
        """Tensors that are on disk, with the sha256 of their source bytes."""
        return self.journal.tensors

    def finish(self, source_hash: str, library_commit: str, data_sha256: str | None) -> None:
        """Fill the reserved fields, give the files their names, and close the journal.

        `data_sha256` is the hash of the data section as the child found it, or None to read the data for it.
        """
        if self.written is not None:
            return
        data_sha256 = data_sha256 or self._data_hash()
        values = {LIBRARY_COMMIT: library_commit, SOURCE_HASH: source_hash, DATA_HASH: data_sha256}
        # metadata stands in the first file; if an earlier run renamed it, it was filled then
        header = fill_reserved(self.layouts[0], values)
        if self.files[0].is_open:
            self.files[0].pwrite(header, 0)
        elif _head(self.paths[0], self.layouts[0]) != header:
            raise InputError(f"{self.paths[0]}: was changed by another program", hint="delete it and start over")
        for file in self.files:
            if file.is_open:
                file.commit()
        status = [path.stat() for path in self.paths]
        self.written = [WrittenFile(path, one.st_size) for path, one in zip(self.paths, status, strict=True)]
        self.journal.finish(
            [
                {"path": path.name, "bytes": one.st_size, "mtime_ns": one.st_mtime_ns}
                for path, one in zip(self.paths, status, strict=True)
            ],
            data_sha256,
        )

    def close(self) -> None:
        """Release the files; partial ones stay, to be continued."""
        for file in self.files:
            file.close()


def fill_reserved(part: Layout, values: Mapping[str, str]) -> bytes:
    """The header with its reserved fields set; each value is cut or padded to its fixed width."""
    header = bytearray(part.header)
    for key, width in RESERVED.items():
        offset, length = part.value_span(key)
        assert length == width
        header[offset : offset + width] = values[key].encode("ascii", "replace")[:width].ljust(width)
    return bytes(header)


def blanked(header: bytes, part: Layout) -> bytes:
    """The header with its reserved fields as they are before anything is known."""
    blank = bytearray(header)
    for key in RESERVED:
        offset, length = part.spans.get(key, (0, 0))
        blank[offset : offset + length] = b" " * length
    return bytes(blank)


def _head(path: Path, part: Layout) -> bytes:
    with path.open("rb") as file:
        return file.read(part.data_start)


def _present(path: Path) -> Path:
    partial = path.with_name(path.name + ".partial")
    return partial if partial.exists() else path


def _hash_into(digest: Any, path: Path, start: int) -> None:
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(_HASH_BLOCK):
            digest.update(block)


def content_hash(model_tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """The source hash: sha256 over 'name, type, shape, sha256 of the data' of each tensor, in the order given.

    It does not depend on file names, shards, metadata or the order in the file, so that the same weights have the
    same hash however they are packed; it is computed tensor by tensor, so that a resumed run need not read again.
    """
    digest = hashlib.sha256(b"apex source 1\n")
    for name, (kind, shape, sha256) in model_tensors.items():
        digest.update(json.dumps([name, kind, list(shape), sha256]).encode() + b"\n")
    return digest.hexdigest()
