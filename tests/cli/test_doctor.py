"""`doctor`: what is missing is named, with the line that gets it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from apex_quant import doctor as module
from apex_quant.cli.show import show_diagnosis
from apex_quant.doctor import Diagnosis, doctor
from apex_quant.native import LibraryInfo, library_info
from apex_quant.native.library import ggml
from apex_quant.version import LIBRARY_VERSION as REQUIRED
from tests.helpers.cli import apex


def cures(found: Diagnosis) -> dict[str, str]:
    return {problem.what: problem.cure for problem in found.problems}


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, enough memory and disk, whatever runs the tests."""
    monkeypatch.setattr(module, "_gpus", lambda: ())
    monkeypatch.setattr(module, "main_memory", lambda: (64 << 30, 32 << 30))
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_all_is_well() -> None:
    found = doctor()
    assert found.problems == ()
    assert found.library == REQUIRED
    assert found.ggml == ggml().version
    assert found.ggml_commit == ggml().commit
    assert found.cpus >= 1
    assert json.loads(json.dumps(found.to_json()))["backends"] == list(found.backends)


@pytest.mark.parametrize(
    ("gpu", "option", "backend"),
    [
        ("NVIDIA H100", "GGML_CUDA", "cuda"),
        ("Tesla T4", "GGML_CUDA", "cuda"),
        ("AMD GPU (ROCm)", "GGML_HIP", "hip"),
        ("Apple GPU (Metal)", "GGML_METAL", "metal"),
    ],
)
def test_gpu_that_the_library_does_not_use(
    gpu: str, option: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_gpus", lambda: (gpu,))
    found = doctor()
    (problem,) = found.problems
    assert gpu in problem.what
    # pip's wheel cache does not know of CMAKE_ARGS: the line must get past it
    assert f'CMAKE_ARGS="-D{option}=on" pip install --force-reinstall --no-cache-dir' in problem.cure
    assert f"llama-cpp-python=={REQUIRED}" in problem.cure
    info = library_info()
    monkeypatch.setattr(module, "library_info", lambda: LibraryInfo(info.version, info.folder, ("cpu", backend)))
    assert doctor().problems == ()


def test_gpu_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the drivers leave under /proc and /dev."""
    monkeypatch.undo()

    def moved(path: str) -> Path:
        return tmp_path / path.lstrip("/")

    monkeypatch.setattr(module, "Path", moved)
    monkeypatch.setattr(sys, "platform", "linux")
    assert module._gpus() == ()
    card = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA H100 PCIe\nIRQ: 5\n")
    assert module._gpus() == ("NVIDIA H100 PCIe",)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert module._gpus() == ("NVIDIA H100 PCIe", "AMD GPU (ROCm)")
    shutil.rmtree(card)
    (tmp_path / "dev/nvidiactl").touch()
    assert module._gpus()[0] == "NVIDIA GPU"


def test_without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(module, "_gpus", lambda: ("NVIDIA H100",))
    found = doctor()
    assert (found.library, found.ggml, found.backends) == (None, None, ())
    assert cures(found).keys() == {"llama-cpp-python is not installed", "no C++ compiler"}
    assert f"pip install llama-cpp-python=={REQUIRED}" in cures(found)["llama-cpp-python is not installed"]
    assert "g++" in cures(found)["no C++ compiler"]
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/c++")
    assert "no C++ compiler" not in cures(doctor())


def test_wrong_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.1.0")
    (problem,) = doctor().problems
    assert problem.what.startswith("llama-cpp-python 0.1.0 is installed")
    assert REQUIRED in problem.cure


def test_library_path_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/opt/llama")
    (problem,) = doctor().problems
    assert problem.cure == "unset LLAMA_CPP_LIB_PATH"


def test_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr("apex_quant.native.ggml", broken)
    (problem,) = doctor().problems
    assert "libgomp.so.1" in problem.what
    assert "--force-reinstall" in problem.cure


def test_small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(module, "main_memory", lambda: (4 << 30, 1 << 30))
    assert [what.split(" ")[:2] for what in cures(doctor())] == [["only", "1.1"], ["only", "1.1"]]


def test_unknown_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No /proc: what cannot be told is left out."""
    from rich.console import Console

    monkeypatch.undo()
    monkeypatch.setattr(module, "Path", lambda path: Path("/nowhere") / str(path).lstrip("/"))
    monkeypatch.setattr(os, "sysconf", lambda _: (_ for _ in ()).throw(ValueError))
    found = doctor()
    assert found.memory_total is None
    assert found.cpu_features == ()
    show_diagnosis(Console(), found)
    assert "processors" in capsys.readouterr().out


def test_command() -> None:
    """Quick and harmless: no library is loaded by the bindings, the exit status is 0 also with problems."""
    result = apex("doctor", "--json")
    assert result.status == 0
    assert {"apex", "python", "library", "ggml_commit", "backends", "memory_total", "disk_free", "problems"} <= set(
        result.json
    )
    result = apex("doctor", LLAMA_CPP_LIB_PATH="/opt/x")
    assert result.status == 0
    assert "missing: LLAMA_CPP_LIB_PATH points the bindings at another library" in result.out
    assert importlib.util.find_spec("llama_cpp") is not None
