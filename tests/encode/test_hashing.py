"""Data sections hashed behind the encoders, in whatever order the tensors are finished."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_quant.encode.hashing import DataHashes, Extent, Section
from apex_quant.errors import InputError


def sections_of(sizes: list[list[int]], waiting: set[str], first: int) -> Section:
    """A section of several files behind a header of 7 bytes each."""
    extents, number = [], 0
    for file, tensors in enumerate(sizes):
        start = 7
        for size in tensors:
            extents.append(Extent(f"t{number}", first + file, start, start + size))
            start += size
            number += 1
    return Section(extents, {extent.tensor for extent in extents} & waiting)


@settings(deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 3 << 20), max_size=5), min_size=1, max_size=3),
    there=st.floats(0, 1),
    seed=st.integers(0, 1 << 30),
)
def test_any_order(tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], there: float, seed: int) -> None:
    chance = random.Random(seed)
    folder = tmp_path_factory.mktemp("data")
    contents = [chance.randbytes(7 + sum(tensors)) for tensors in sizes]
    files = []
    for number, content in enumerate(contents):
        (folder / str(number)).write_bytes(content)
        files.append((folder / str(number)).open("rb"))
    names = [f"t{n}" for n in range(sum(map(len, sizes)))]
    waiting = [name for name in names if chance.random() >= there]
    # the second section is the first file alone, with nothing to wait for
    both = [sections_of(sizes, set(waiting), 0), sections_of(sizes[:1], set(), 0)]
    both = [Section.from_json(section.to_json()) for section in both]
    hashes = DataHashes([file.fileno() for file in files], both)
    try:
        chance.shuffle(waiting)
        for name in waiting:
            hashes.finished(name)
        wanted = [b"".join(content[7:] for content in contents), contents[0][7:]]
        assert hashes.digests() == [hashlib.sha256(data).hexdigest() for data in wanted]
    finally:
        hashes.close()
        for file in files:
            file.close()


def test_file_cut_short(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234567")
    fd = os.open(tmp_path / "a", os.O_RDONLY)
    hashes = DataHashes([fd], [Section([Extent("t", 0, 0, 8)], set())])
    with pytest.raises(InputError, match="cut short"):
        hashes.digests()
    hashes.close()
    os.close(fd)
