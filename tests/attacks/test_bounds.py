"""The costliest files the bounds let through, and the emptiest claims, under limits the kernel enforces.

Each runs in a process of its own with 5 s of CPU time (the aim is 1 s; the rest is the interpreter, numpy
and slow machines) and an address space 200 MB above what the process has after its imports.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apex_quant.gguf import limits
from tests.attacks.builder import (
    ARRAY,
    ATTACKS,
    BOOL,
    STRING,
    U8,
    Attack,
    gguf,
    pair,
    row,
    text,
    u32,
    u64,
    write,
)

CHILD = """
import resource, sys
from apex_quant.errors import GGUFError
from apex_quant.gguf import open_model
pages = int(open("/proc/self/statm").read().split()[0])
room = pages * resource.getpagesize() + 200_000_000
resource.setrlimit(resource.RLIMIT_AS, (room, room))
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
try:
    with open_model(sys.argv[1]) as model:
        print("opened", len(model.tensors), len(model.metadata))
except GGUFError as error:
    print("refused", error.field)
"""


def most(what: str) -> int:
    return limits.MAX_WORK // limits.WORK[what]


def many_tensors() -> Attack:
    n = most("tensors")
    rows = [row(b"blk.%d.a_name_as_long_as_they_get.weight" % i, (1, 1, 1, 1), 0, 32 * i) for i in range(n)]
    return Attack(gguf(*rows, tensors=n, data=1), None, size=1 << 40)


def many_tensors_and_an_overlap() -> Attack:
    n = most("tensors")
    rows = [row(b"t%d" % i, (8,), 0, 32 * (n - i if i else 1)) for i in range(n)]
    return Attack(gguf(*rows, tensors=n, data=1), "overlaps", f"t{n - 1}", size=1 << 40)


def many_strings() -> Attack:
    n = most("strings") - 1000
    return Attack(gguf(pair(b"k", ARRAY, u32(STRING) + u64(n) + text(b"\xff" * 20) * n), keys=1), None)


def many_keys() -> Attack:
    """Names with one wide character take four bytes for each in memory."""
    n = most("keys")
    names = [b"%d" % i + b"k" * (250 - len(b"%d" % i)) + "\U0001f600".encode() for i in range(n)]
    return Attack(gguf(*(pair(name, BOOL, b"\1") for name in names), keys=n), None)


def long_array() -> Attack:
    n = limits.MAX_HEADER_BYTES - 100
    return Attack(gguf(pair(b"k", ARRAY, u32(U8) + u64(n)), keys=1), None, size=limits.MAX_HEADER_BYTES)


COSTLY = {make.__name__: make for make in (many_tensors, many_tensors_and_an_overlap, many_strings)} | {
    make.__name__: make for make in (many_keys, long_array)
}
CLAIMS = ("2^62 strings", "2^62 numbers", "2^62 keys", "2^62 tensors", "4 TB of string", "4 TB of array")


def in_child(path: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("name", [*COSTLY, *CLAIMS])
def test_time_and_memory(name: str, tmp_path: Path) -> None:
    attack = COSTLY[name]() if name in COSTLY else ATTACKS[name]
    said = in_child(write(attack, tmp_path / "x.gguf"))
    assert said.startswith("opened" if attack.says is None else f"refused {attack.field}")
