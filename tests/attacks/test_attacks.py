"""Every hostile file is answered with a GGUFError that names the file and the field; every odd but legal one opens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from apex_quant.errors import GGUFError
from apex_quant.gguf import open_model
from tests.attacks.builder import ATTACKS, SHARDS, THINGS, write


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name: str, tmp_path: Path) -> None:
    attack = ATTACKS[name]
    path = write(attack, tmp_path / "x.gguf")
    if attack.says is None:
        with open_model(path) as model:
            for value in model.metadata.values():
                assert value.data is not None
            for info in model.tensors.values():
                assert len(model.read(info, size=min(info.nbytes, 64))) == min(info.nbytes, 64)
        return
    with pytest.raises(GGUFError, match=re.escape(attack.says)) as caught:
        open_model(path)
    assert caught.value.path == path
    assert caught.value.field == attack.field or attack.field is None
    assert caught.value.offset is None or caught.value.offset >= 0


@pytest.mark.parametrize("name", SHARDS)
def test_shards(name: str, tmp_path: Path) -> None:
    files, opened, says = SHARDS[name]
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    if says is None:
        with open_model(tmp_path / opened) as model:
            assert list(model.tensors) == ["a", "b"]
        return
    with pytest.raises(GGUFError, match=re.escape(says)):
        open_model(tmp_path / opened)


@pytest.mark.parametrize("name", THINGS)
def test_no_regular_file(name: str, tmp_path: Path) -> None:
    THINGS[name](tmp_path / "x.gguf")
    with pytest.raises(GGUFError, match=r"x\.gguf: (cannot be opened|is not a regular file|is a folder)"):
        open_model(tmp_path / "x.gguf")


def test_path_with_a_null_byte() -> None:
    with pytest.raises(GGUFError, match="cannot be opened"):
        open_model("a\0b.gguf")


def test_every_truncation_of_a_file(tmp_path: Path) -> None:
    """Cut anywhere, a file whose last byte is tensor data is refused, and no descriptor is left open."""
    whole = ATTACKS["version 2"].data
    path = tmp_path / "x.gguf"
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(GGUFError):
            open_model(path)
    after = len(list(Path("/proc/self/fd").iterdir())) if before else 0
    assert after == before
