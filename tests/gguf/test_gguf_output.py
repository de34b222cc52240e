"""AtomicFile, split and merge: whole files or none, whatever fails on the way."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from apex_quant.errors import GGUFError, ResourceError, UsageError
from apex_quant.gguf import (
    TYPES,
    AtomicFile,
    TensorSpec,
    Value,
    ValueType,
    layout,
    merge,
    open_model,
    require_space,
    split,
    tools,
)


def full_disk(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_nothing_under_the_name_before_commit(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    file = AtomicFile(target)
    file.pwrite(b"world", 6)
    file.pwrite(bytearray(b"hello "), 0)
    file.sync()
    assert not target.exists()
    assert (file.size, file.pread(100, 0)) == (11, b"hello world")
    file.commit()
    assert target.read_bytes() == b"hello world"
    assert list(tmp_path.iterdir()) == [target]


def test_old_file_stays_until_commit(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"old")
    file = AtomicFile(target)
    file.pwrite(b"new", 0)
    assert target.read_bytes() == b"old"
    file.commit()
    assert target.read_bytes() == b"new"


def test_abandon_and_close(tmp_path: Path) -> None:
    file = AtomicFile(tmp_path / "x")
    file.pwrite(b"kept", 0)
    file.close()
    assert file.partial.read_bytes() == b"kept"
    file = AtomicFile(tmp_path / "x", resume=True)
    assert file.pread(9, 0) == b"kept"
    file.close()
    file = AtomicFile(tmp_path / "x")
    assert file.size == 0
    file.abandon()
    file.abandon()
    assert list(tmp_path.iterdir()) == []


def test_abandon_after_commit_keeps_the_file_of_the_next_writer(tmp_path: Path) -> None:
    first = AtomicFile(tmp_path / "x")
    first.commit()
    second = AtomicFile(tmp_path / "x")
    first.abandon()
    assert second.partial.exists()
    second.abandon()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    file = AtomicFile(tmp_path / "x")
    file.pwrite(b"mine", 0)
    with pytest.raises(ResourceError, match="another process"):
        AtomicFile(tmp_path / "x")
    assert file.pread(4, 0) == b"mine"
    file.abandon()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:3], at))
    file = AtomicFile(tmp_path / "x")
    file.pwrite(np.arange(5, dtype="<u2").tobytes(), 0)
    file.commit()
    assert (tmp_path / "x").read_bytes() == np.arange(5, dtype="<u2").tobytes()


def write_all(file: AtomicFile) -> None:
    file.pwrite(b"a", 0)
    file.sync()
    file.commit()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync"])
def test_full_disk(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = AtomicFile(tmp_path / "x")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(ResourceError, match=r"x\.partial: cannot be .*No space") as caught:
        write_all(file)
    assert caught.value.exit_code == 4
    assert caught.value.hint is not None
    assert not (tmp_path / "x").exists()
    file.abandon()


def test_file_size_limit_of_the_system(tmp_path: Path) -> None:
    """A real refusal by the kernel, in a process that may write no more than 1000 bytes to a file."""
    code = (
        "import resource, signal, sys\n"
        "from apex_quant.errors import ResourceError\n"
        "from apex_quant.gguf import AtomicFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "file = AtomicFile(sys.argv[1])\n"
        "file.pwrite(b'a' * 900, 0)\n"
        "try: file.pwrite(b'a' * 900, 900)\n"
        "except ResourceError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert "x.partial: cannot be written: File too large" in run.stdout
    assert not (tmp_path / "x").exists()


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="No such file"):
        AtomicFile(tmp_path / "nowhere" / "x")
    with pytest.raises(ResourceError, match="nowhere"):
        require_space(tmp_path / "nowhere" / "x", 1)
    with pytest.raises(ResourceError, match="bytes needed"):
        require_space(tmp_path / "x", 1 << 62)
    require_space(tmp_path / "x", 1)


METADATA = {
    "general.architecture": Value.string("llama"),
    "tokenizer.ggml.tokens": Value.array(ValueType.STRING, ["a", "é"]),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of ten tensors with random data."""
    pick = np.random.default_rng(0)
    kinds = ["Q4_K", "F32", "Q8_0", "BF16", "Q6_K"] * 2
    tensors = [TensorSpec(f"t{i}", (256, i + 1), TYPES[kind]) for i, kind in enumerate(kinds)]
    plan = layout(METADATA, tensors)
    path = tmp_path / "source.gguf"
    with path.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.total_bytes)
        for tensor in tensors:
            file.seek(plan.offsets[tensor.name])
            file.write(pick.bytes(tensor.nbytes))
    return path


def test_split_and_merge_give_the_file_back(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "COPY_BYTES", 1000)  # several pieces for each tensor
    seen: list[tuple[int, int]] = []
    shards = split(source, tmp_path / "out.gguf", 8000, lambda done, total: seen.append((done, total)))
    assert [path.name for path in shards] == [f"out-{i + 1:05d}-of-00004.gguf" for i in range(4)]
    assert seen[-1][0] == seen[-1][1] == sum(path.stat().st_size for path in shards)
    with open_model(source) as one, open_model(shards[3]) as many:
        assert list(one.tensors) == list(many.tensors)
        assert len(many.files) == 4
        for name in one.tensors:
            assert one.read(one.tensors[name]) == many.read(many.tensors[name])
    assert merge(shards[3], tmp_path / "back.gguf") == tmp_path / "back.gguf"
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


def test_split_into_a_folder(source: Path, tmp_path: Path) -> None:
    """Shards are named as the model, also where that was a shard itself."""
    for name, given in (("a", source), ("b", tmp_path / "a" / f"{source.stem}-00001-of-00004.gguf")):
        (tmp_path / name).mkdir()
        shards = split(given, tmp_path / name, 8000)
        assert [path.name for path in shards] == [f"{source.stem}-{i + 1:05d}-of-00004.gguf" for i in range(4)]
        assert {path.parent for path in shards} == {tmp_path / name}


def test_nothing_is_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    old = tmp_path / "out-00004-of-00004.gguf"
    old.write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match="exists already"):
        split(source, tmp_path / "out", 8000)
    with pytest.raises(UsageError, match="exists already"):
        merge(source, old)
    assert (sorted(tmp_path.iterdir()), old.read_bytes()) == (before, b"old")
    split(source, tmp_path / "out", 8000, force=True)
    assert old.read_bytes() != b"old"


def test_failed_split_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def fails_late(self: AtomicFile, data: bytes, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise ResourceError("full")

    monkeypatch.setattr(AtomicFile, "pwrite", fails_late)
    with pytest.raises(ResourceError, match="full"):
        split(source, tmp_path / "out", 8000)
    assert list(tmp_path.iterdir()) == [source]


def test_merge_names_a_missing_shard(source: Path, tmp_path: Path) -> None:
    shards = split(source, tmp_path / "out", 8000)
    shards[2].unlink()
    with pytest.raises(GGUFError, match=r"1 of its 4 shards are missing: out-00003-of-00004\.gguf"):
        merge(shards[0], tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="at least 1"):
        split(source, tmp_path / "x", 0)
