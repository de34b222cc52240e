"""A folder where every module that Python knows is somebody's program: nothing of it runs when apex is used there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import apex_quant
from apex_quant.converter_python import probe
from apex_quant.errors import ResourceError
from apex_quant.mlx import convert_mlx
from apex_quant.other_python import file_command
from tests.convert.tiny_checkpoint import write_checkpoint
from tests.helpers.random_models import write_random_gguf

ROOT = Path(apex_quant.__file__).parent
OTHERS = ("numpy", "gguf", "torch", "transformers", "mlx", "mlx_lm", "pip", "venv", "llama_cpp", "apex_quant")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder; a module of it that is imported leaves a file `ran`."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    program = f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__ + ' ')\n"
    for name in {*sys.stdlib_module_names, *OTHERS}:
        (folder / f"{name}.py").write_text(program)
    monkeypatch.chdir(folder)
    return folder


def ran(folder: Path) -> str:
    file = folder.parent / "ran"
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("inherited", [None, "", os.pathsep])
def test_the_encoder(hostile: Path, inherited: str | None) -> None:
    """Its child is a Python of its own, and an empty entry of PYTHONPATH would be the current folder."""
    model = write_random_gguf(hostile / "m.gguf", "qwen3moe", layers="M")
    code = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}); from apex_quant.cli import main; main()"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {} if inherited is None else {"PYTHONPATH": inherited}
    words = ["quantize", str(model), "--tier", "quality", "-j", "1"]
    # -I for the command itself: an installed `apex` does not look here either
    done = subprocess.run([sys.executable, "-I", "-c", code, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ran(hostile) == ""


def test_looking_at_another_python(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert probe(sys.executable).versions["numpy"] is not None
    assert ran(hostile) == ""


def test_mlx(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the look for mlx-lm nor the program that is written beside the model takes modules from there."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    checkpoint = write_checkpoint(hostile / "hf")
    with pytest.raises(ResourceError, match="needs mlx-lm"):
        convert_mlx(checkpoint, hostile / "out", python=sys.executable)
    (hostile / "program.py").write_text("import csv, sys\nprint(sys.argv[1:], csv.QUOTE_ALL, __name__)")
    command = file_command(sys.executable, hostile / "program.py", "a", "b")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "['a', 'b'] 1 __main__\n"
    assert ran(hostile) == ""


def test_every_python_that_is_started() -> None:
    """`sys.executable` is followed by -P, or by a file of ours."""
    started = [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in ROOT.rglob("*.py")
        for found in re.finditer(r"\bsys\.executable, (?!\"-P\"|guard\.__file__)[^)\]]*", path.read_text())
    ]
    assert started == []
