"""10,000 mutated and truncated GGUF files in one process: each opens or is a GGUFError, nothing else.

8,000 by seeded mutation, 2,000 by hypothesis. What opens must also survive in full: every value decodes,
tensor data reads, and the file we would write from it reads back the same.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apex_quant.errors import GGUFError
from apex_quant.gguf import layout, open_model
from tests.attacks.builder import (
    ARCH,
    ARRAY,
    ATTACKS,
    BOOL,
    F32,
    I32,
    Q4_K,
    STRING,
    U32,
    U64,
    gguf,
    pair,
    row,
    shard,
    text,
    u32,
    u64,
)

FULL = gguf(
    ARCH,
    pair(b"general.alignment", U32, u32(32)),
    pair(b"llama.block_count", U32, u32(2)),
    pair(b"a.flag", BOOL, b"\1"),
    pair(b"a.long", U64, u64(1 << 40)),
    pair(b"tokens", ARRAY, u32(STRING) + u64(4) + text(b"a") + text(b"") + text(b"\xff\xfe") + text("é".encode())),
    pair(b"types", ARRAY, u32(I32) + u64(5) + u32(1) * 5),
    pair(b"flags", ARRAY, u32(BOOL) + u64(3) + b"\0\1\1"),
    row(b"token_embd.weight", (256, 3), Q4_K, 0),
    row(b"blk.0.attn_norm.weight", (16,), F32, 448),
    row(b"blk.0.ffn_up_exps.weight", (32, 2, 3), F32, 512),
    keys=8,
    tensors=3,
    data=1280,
)
SEEDS = [FULL, ATTACKS["version 2"].data, ATTACKS["alignment 64"].data, shard(0, 1, b"a", 1)]
TELLING = [0, 1, 2, 3, 7, 8, 9, 31, 32, 63, 64, 255, 256, 1 << 16, 1 << 20]
TELLING += [1 << n for n in (31, 32, 40, 61, 62, 63)] + [(1 << n) - 1 for n in (31, 32, 62, 63, 64)]


def mutate(data: bytes, pick: random.Random) -> bytes:
    """One to four edits: bytes, numbers of 4 and 8 bytes, cuts, repeats, holes."""
    out = bytearray(data)
    for _ in range(pick.choice((1, 1, 1, 2, 4))):
        at = pick.randrange(len(out)) if out else 0
        span = pick.randrange(1, 64)
        match pick.randrange(8):
            case 0:
                out[at : at + 1] = bytes([pick.randrange(256)])
            case 1 if out:
                out[at] ^= 1 << pick.randrange(8)
            case 2:
                out[at : at + 8] = struct.pack("<Q", pick.choice(TELLING))
            case 3:
                out[at : at + 4] = struct.pack("<I", pick.choice(TELLING) & 0xFFFFFFFF)
            case 4:
                del out[at:]
            case 5:
                del out[at : at + span]
            case 6:
                out[at:at] = out[at : at + span]
            case _:
                out[at : at + span] = bytes(span)
    return bytes(out)


def check(path: Path, data: bytes) -> str:
    """Opens it; anything but success or GGUFError escapes."""
    path.write_bytes(data)
    try:
        model = open_model(path)
    except GGUFError as error:
        return "refused" if error.path == path else "refused another file"
    with model:
        for file in model.files:
            for value in file.metadata.values():
                assert value.data is not None
        for info in model.tensors.values():
            assert len(model.read(info)) == info.nbytes
            assert info.rows * info.row_bytes == info.nbytes
        again = layout(model.metadata, list(model.tensors.values()))
        path.write_bytes(again.header.ljust(again.total_bytes, b"\0"))
        with open_model(path) as copy:
            assert dict(copy.metadata) == dict(model.metadata)
            assert [(t.name, t.nbytes) for t in copy.tensors.values()] == [
                (t.name, t.nbytes) for t in model.tensors.values()
            ]
    return "opened"


def test_seeds_open(tmp_path: Path) -> None:
    for data in SEEDS:
        assert check(tmp_path / "x.gguf", data) == "opened"


@pytest.mark.parametrize("chunk", range(4))
def test_mutations(chunk: int, tmp_path: Path) -> None:
    """2,000 each. The counts guard against a corpus that never gets past the magic or is never refused."""
    pick = random.Random(chunk)
    counts = Counter(check(tmp_path / "x.gguf", mutate(pick.choice(SEEDS), pick)) for _ in range(2000))
    assert set(counts) == {"refused", "opened"}
    assert counts["refused"] > 500
    assert counts["opened"] > 200


@settings(
    max_examples=2000,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(
        st.tuples(
            st.integers(0, 2047),
            st.integers(0, 16),
            st.one_of(
                st.binary(max_size=12),
                st.sampled_from(TELLING).map(lambda n: struct.pack("<Q", n)),
                st.sampled_from(TELLING).map(lambda n: struct.pack("<I", n & 0xFFFFFFFF)),
            ),
        ),
        max_size=4,
    ),
    end=st.one_of(st.none(), st.integers(0, 2047)),
)
def test_hypothesis(tmp_path: Path, seed: bytes, edits: list[tuple[int, int, bytes]], end: int | None) -> None:
    data = bytearray(seed)
    for at, removed, put in edits:
        data[at : at + removed] = put
    check(tmp_path / "x.gguf", bytes(data[:end]))
