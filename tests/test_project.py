"""The project's own promises: pins that agree, one clear sentence on a bare machine, lazy imports."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import apex_quant
from apex_quant.version import LIBRARY as PACKAGE
from apex_quant.version import LIBRARY_VERSION as REQUIRED

ROOT = Path(__file__).resolve().parents[1]


def test_pins_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"{PACKAGE}=={REQUIRED}" in project["dependencies"]
    assert project["version"] == apex_quant.__version__
    assert f"{PACKAGE}=={REQUIRED}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_missing_compiler_is_one_sentence() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_machine.py")],
        env={"PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4
    assert done.stderr.startswith("error: No C++ compiler was found")
    assert "apt install g++" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, apex_quant; print([m for m in ('numpy', 'pydantic', 'rich', 'llama_cpp') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves() -> None:
    for name in apex_quant.__all__:
        assert getattr(apex_quant, name) is not None
