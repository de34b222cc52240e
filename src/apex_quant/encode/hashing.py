"""sha256 of outputs' data sections, computed behind the encoders.

A data section is hashed in file order, but tensors are finished in any order: each file's hash follows the tensors
that are finished without a gap, on threads of its own. Read back at once, the data is still in the page cache; done
at the end instead, the hash of one file would keep all processors but one waiting (0.1 s for each 160 MB).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

from apex_quant.errors import InputError

BLOCK = 1 << 20


class Extent(NamedTuple):
    """A tensor's bytes with the padding behind them: `file` is an index into the descriptors."""

    tensor: str
    file: int
    start: int
    end: int


@dataclass
class Section:
    """A data section in the order in which it is hashed; `waiting` are its tensors that are still to be written."""

    extents: Sequence[Extent]
    waiting: set[str]

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Section:
        return cls([Extent(*row) for row in data["extents"]], set(data["waiting"]))

    def to_json(self) -> dict[str, Any]:
        return {"extents": [list(extent) for extent in self.extents], "waiting": sorted(self.waiting)}


class DataHashes:
    """The hashes of several sections. All methods are called by one thread."""

    def __init__(self, fds: Sequence[int], sections: Sequence[Section]) -> None:
        self._fds, self._sections = fds, sections
        self._next = [0] * len(sections)
        self._digests = [hashlib.sha256() for _ in sections]
        # one thread for each section: a section that advances twice does so in order
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="hash") for _ in sections]
        self._work: list[Future[None]] = []
        for number in range(len(sections)):
            self._advance(number)

    def finished(self, tensor: str) -> None:
        """This tensor is written to all its places."""
        for number, section in enumerate(self._sections):
            if tensor in section.waiting:
                section.waiting.remove(tensor)
                self._advance(number)

    def _advance(self, number: int) -> None:
        section, first = self._sections[number], self._next[number]
        last = first
        while last < len(section.extents) and section.extents[last].tensor not in section.waiting:
            last += 1
        if last > first:
            self._next[number] = last
            self._work.append(self._threads[number].submit(self._hash, number, section.extents[first:last]))

    def _hash(self, number: int, extents: Sequence[Extent]) -> None:
        digest, view = self._digests[number], memoryview(bytearray(BLOCK))
        for _, file, start, end in extents:
            while start < end:
                count = os.preadv(self._fds[file], [view[: min(BLOCK, end - start)]], start)
                if count == 0:
                    raise InputError("an output was cut short by another program while it was written")
                digest.update(view[:count])
                start += count

    def close(self) -> None:
        """End the threads; what was queued and has not begun is dropped."""
        for pool in self._threads:
            pool.shutdown(wait=True, cancel_futures=True)

    def digests(self) -> list[str]:
        """The hashes, in hexadecimal, once all tensors are finished. Raises what went wrong on the way."""
        for future in self._work:
            future.result()
        assert not any(section.waiting for section in self._sections)
        return [digest.hexdigest() for digest in self._digests]
