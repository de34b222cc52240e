"""Finding and loading the library: lazily, only the version it is made for, never with another layout of types."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apex_quant.errors import ResourceError
from apex_quant.gguf.types import TYPES, TYPES_BY_ID
from apex_quant.native import Ggml, LibraryInfo, ggml, library, library_info
from apex_quant.version import LIBRARY, LIBRARY_VERSION


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has not loaded the library yet."""
    monkeypatch.setattr(library, "ggml", library.ggml.__wrapped__)
    return monkeypatch


def test_pin() -> None:
    """The version the code is made for is the one that is installed with it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert f"{LIBRARY}=={LIBRARY_VERSION}" in project["dependencies"]


def test_loaded_library() -> None:
    info = library_info()
    assert info.problem is None
    assert "cpu" in info.backends
    assert "base" not in info.backends
    lib = ggml()
    assert lib.commit
    assert lib is ggml()
    for kind in TYPES.values():
        assert lib.row_size(kind.id, kind.block * 3) == kind.row_bytes(kind.block * 3)


def test_asking_loads_nothing() -> None:
    code = (
        "import sys, apex_quant, apex_quant.native as n\n"
        "assert n.library_info().version and not n.library_info().problem\n"
        "assert 'llama_cpp' not in sys.modules\n"
        "assert 'ggml' not in open('/proc/self/maps').read()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=None)


def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_not_installed(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ResourceError, match="llama-cpp-python is not installed") as caught:
        library.ggml()
    assert f"pip install llama-cpp-python=={LIBRARY_VERSION}" in str(caught.value.hint)


def test_another_version(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setattr(importlib.metadata, "version", lambda _: "0.2.1")
    with pytest.raises(ResourceError, match=f"0.2.1 is installed, this version works with {LIBRARY_VERSION} only"):
        library.ggml()


def test_module_gone(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ResourceError, match="not installed"):
        library.ggml()


def test_library_path_of_another(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setenv("LLAMA_CPP_LIB_PATH", "/somewhere")
    with pytest.raises(ResourceError, match="LLAMA_CPP_LIB_PATH") as caught:
        library.ggml()
    assert "unset" in str(caught.value.hint)


def test_installed_without_its_files(unloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unloaded.setattr(library, "library_info", lambda: LibraryInfo(LIBRARY_VERSION, tmp_path, ()))
    with pytest.raises(ResourceError, match="without ggml-base") as caught:
        library.ggml()
    assert "--force-reinstall" in str(caught.value.hint)


def test_another_layout_is_refused(unloaded: pytest.MonkeyPatch) -> None:
    """Sizes that moved would be silent memory corruption."""
    wrong = replace(TYPES["Q4_K"], bytes=143)
    unloaded.setitem(TYPES_BY_ID, wrong.id, wrong)
    with pytest.raises(ResourceError, match="disagrees about Q4_K: blocks of 256 in 144 bytes, not 256 in 143"):
        library.ggml()


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_K"])
def test_decoders(name: str) -> None:
    import gguf

    kind = TYPES[name]
    rows = np.random.default_rng(0).standard_normal((3, 256), dtype=np.float32)
    raw = (
        gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name]) if name != "Q4_K" else np.zeros((3, 144), np.uint8)
    )
    out = np.empty_like(rows)
    ggml().to_float(kind)(np.ascontiguousarray(raw).ctypes.data, out.ctypes.data, out.size)
    assert np.array_equal(out, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name]).reshape(rows.shape))


def test_no_decoder() -> None:
    with pytest.raises(ResourceError, match="cannot decode I32"):
        ggml().to_float(TYPES["I32"])


def test_grid_without_builders() -> None:
    """A library that does not export its builders makes its tables under its lock: slower, same result."""
    info = library_info()
    assert info.folder is not None
    lib = Ggml(library._library_file(info.folder, "ggml-base"))
    lib._builders = dict.fromkeys(lib._builders)
    kind = TYPES["IQ3_XXS"]
    rows = np.random.default_rng(1).standard_normal((2, 256), dtype=np.float32)
    made = []
    for one in (lib, ggml()):
        one.start_grids([kind])
        one.wait_grid(kind)
        out = np.empty(2 * kind.row_bytes(256), np.uint8)
        one.quantize_chunk(kind.id, rows.ctypes.data, out.ctypes.data, 0, 2, 256, None)
        assert one.validate(kind, out.ctypes.data, out.nbytes)
        made.append(out.tobytes())
    assert made[0] == made[1]
