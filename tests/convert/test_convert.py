"""`convert` around a stand-in for the converter: unpacking it, what is refused, how failures and Ctrl-C end."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from apex_quant import convert as module
from apex_quant import hub
from apex_quant.cache import cache_folder
from apex_quant.checkpoint import describe
from apex_quant.cli.convert import convert as command
from apex_quant.convert import ConvertProgress, convert
from apex_quant.converter_python import VARIABLE, ConverterPython, find_python, probe
from apex_quant.converter_source import SDIST_SHA256, Converter, find_converter, unpack
from apex_quant.errors import ApexError, InputError, NativeError, ResourceError, UsageError
from apex_quant.version import LIBRARY_VERSION
from tests.convert.fake_sdist import unpacked, write_sdist
from tests.convert.test_checkpoint import make
from tests.helpers.random_models import write_random_gguf

Made = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that the stand-in converts, in an empty cache of its own."""
    folder = make(tmp_path / "Tiny-MoE")
    write_random_gguf(folder / "result.gguf", "qwen3moe", layers="MM")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LLAMA_CPP_DIR", str(unpacked(tmp_path / "llama.cpp")))
    monkeypatch.setattr(module, "find_python", lambda _=None: ConverterPython(Path(sys.executable), {}))
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_pinned_release_has_a_hash() -> None:
    assert len(SDIST_SHA256[LIBRARY_VERSION]) == 64


def test_a_conversion(checkpoint: Path) -> None:
    events: list[ConvertProgress] = []
    lines: list[str] = []
    made = convert(checkpoint, progress=events.append, say=lines.append)
    assert made.path == Path("Tiny-MoE-BF16.gguf")
    assert made.path.read_bytes() == (checkpoint / "result.gguf").read_bytes()
    assert (made.architecture, made.outtype) == ("qwen3moe", "bf16")
    assert [(event.phase, event.share) for event in events] == [("reading", 1 / 3), ("writing", 0), ("writing", 0.5)]
    assert "something odd" in made.warnings
    assert any("no chat template" in warning for warning in made.warnings)
    assert "--> BF16" in lines[0]
    json.dumps(made.to_json())
    with pytest.raises(UsageError, match="exists already"):
        convert(checkpoint)
    convert(checkpoint, force=True)
    assert [path.name for path in Path().glob("*.partial")] == []


def test_braces_in_names_are_names(checkpoint: Path) -> None:
    made = convert(checkpoint, "a{ftype}{x}.gguf")
    assert made.path.name == "a{ftype}{x}.gguf"
    assert made.path.is_file()


@pytest.mark.parametrize(
    ("todo", "kind", "word"),
    [
        ("die", NativeError, "SIGKILL"),
        ("junk", InputError, "gguf"),
        ("say ValueError: odd", NativeError, "ValueError: odd"),
        ("say OSError: [Errno 28] No space left on device", ResourceError, "No space"),
        ("say NotImplementedError: BPE pre-tokenizer was not recognized", InputError, "BPE"),
        ("say ModuleNotFoundError: No module named 'x'", ResourceError, "No module"),
        ("say RuntimeError: APEX: the checkpoint wants to run Python code of its own", InputError, "Python code"),
        ("say ERROR:hf-to-gguf:Model X is not supported", InputError, "not supported"),
    ],
)
def test_failures_are_explained_and_leave_nothing(
    checkpoint: Path, todo: str, kind: type[ApexError], word: str
) -> None:
    (checkpoint / "do").write_text(todo)
    with pytest.raises(kind, match=word) as caught:
        convert(checkpoint, "x.gguf")
    assert type(caught.value) is kind or kind is InputError
    assert list(Path().glob("x.gguf*")) == []


def test_an_interrupt_ends_the_converter(checkpoint: Path) -> None:
    (checkpoint / "do").write_text("hang")
    pids: list[int] = []

    def say(line: str) -> None:
        if line.startswith("hanging"):
            pids.append(int(line.split()[1]))
            signal.raise_signal(signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, "x.gguf", say=say)
    assert list(Path().glob("x.gguf*")) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_refusals_before_anything_starts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make(checkpoint.parent / "other", {"architectures": ["Qwen3_6MoeForCausalLM"]})
    with pytest.raises(InputError, match=r"does not convert Qwen3_6Moe.* Did you mean Qwen3_5Moe"):
        convert(other)
    with pytest.raises(InputError, match="no vision or audio tower"):
        convert(checkpoint, mmproj=True)
    with pytest.raises(UsageError, match="Did you mean f16"):
        convert(checkpoint, outtype="fp16")
    with pytest.raises(UsageError, match=r"ends in \.gguf"):
        convert(checkpoint, "x.bin")
    with pytest.raises(UsageError, match="--revision"):
        convert(checkpoint, revision="main")
    with pytest.raises(InputError, match="no such directory"):
        convert("/nowhere/at/all")
    (other / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="is not there"):
        convert(other)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(ResourceError, match="free there"):
        convert(checkpoint)
    assert list(Path().glob("*.gguf*")) == []


def test_methods_that_the_pinned_converter_does_not_read(checkpoint: Path) -> None:
    folder = make(checkpoint.parent / "q", {"quantization_config": {"quant_method": "awq"}})
    pinned = Converter(Path(os.environ["LLAMA_CPP_DIR"]), "it", pinned=True)
    with pytest.raises(InputError, match="awq"):
        module.check(describe(folder), pinned)


def test_a_hub_id_is_downloaded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration first: no weight of what the converter does not know, and all of one commit."""
    asked: list[tuple[str, str | None, tuple[str, ...] | None]] = []
    commit = checkpoint.rename(checkpoint.with_name("c0ffee"))

    def download(repo: str, *, revision: str | None = None, patterns: tuple[str, ...] | None = None) -> Path:
        asked.append((repo, revision, patterns))
        return commit

    monkeypatch.setattr(hub, "download", download)
    assert convert("org/Name-1B", revision="v1").path.name == "Name-1B-BF16.gguf"
    assert asked == [("org/Name-1B", "v1", ("config.json",)), ("org/Name-1B", "c0ffee", None)]
    asked.clear()
    config = json.loads((commit / "config.json").read_text())
    (commit / "config.json").write_text(json.dumps({**config, "architectures": ["OtherForCausalLM"]}))
    with pytest.raises(InputError, match=r"org/Name-1B: .* does not convert OtherForCausalLM"):
        convert("org/Name-1B")
    assert len(asked) == 1


def test_missing_needs_are_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("apex_quant.converter_python.NEEDS", {"sys": "sys", "nothing_like_it": "nothing-like-it"})
    monkeypatch.delenv(VARIABLE, raising=False)
    for given, hint in ((None, "--setup"), (sys.executable, "pip install nothing-like-it")):
        with pytest.raises(ResourceError, match="needs nothing-like-it") as caught:
            find_python(given)
        assert hint in (caught.value.hint or "")
    assert probe(sys.executable).missing == ("nothing-like-it",)
    with pytest.raises(UsageError, match="not a working Python"):
        find_python(tmp_path / "none")


def test_the_sdist_is_unpacked_once_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    archive = tmp_path / "a.tar.gz"
    digest = write_sdist(archive)
    found = find_converter(sdist=archive, sha256=digest)
    assert found.architectures() == {"Qwen3_5MoeForCausalLM"}
    assert found.architectures(mmproj=True) == {"Qwen3VLForConditionalGeneration"}
    assert not (found.folder / "src").exists()
    assert [path.name for path in cache_folder().iterdir()] == [found.folder.name]
    assert find_converter(sdist=tmp_path / "not needed", sha256=digest) == found
    found.script.write_text("changed")
    find_converter(sdist=archive, sha256=digest)
    assert "argparse" in found.script.read_text()


def _link() -> tarfile.TarInfo:
    info = tarfile.TarInfo("llama_cpp_python-9/vendor/llama.cpp/conversion/x.py")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


def test_archives_that_are_refused(tmp_path: Path) -> None:
    archive, target = tmp_path / "a.tar.gz", tmp_path / "new"
    write_sdist(archive)
    with pytest.raises(InputError, match="not the released source"):
        unpack(archive, "0" * 64, target)
    with pytest.raises(InputError, match="no ordinary file"):
        unpack(archive, write_sdist(archive, {"link": _link()}), target)
    with pytest.raises(InputError, match="holds no convert_hf"):
        unpack(archive, write_sdist(archive, leave="convert_hf_to_gguf.py"), tmp_path / "new2")
    digest = write_sdist(archive, {"llama_cpp_python-9/vendor/llama.cpp/conversion/../../../../../evil.py": b"1"})
    unpack(archive, digest, tmp_path / "deep" / "new3")
    assert list(tmp_path.rglob("evil.py")) == []
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(InputError, match="is broken"):
        unpack(archive, hashlib.sha256(archive.read_bytes()).hexdigest(), tmp_path / "new4")


def test_a_wrong_checkout_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    with pytest.raises(UsageError, match=r"no convert_hf_to_gguf\.py there"):
        find_converter()


def test_the_command(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(str(checkpoint), Path("x.gguf"), as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == "x.gguf"
    assert document["checkpoint"]["complete"] is True
    command(str(checkpoint), describe=True)
    assert "layers: 2" in capsys.readouterr().out
    with pytest.raises(UsageError, match="name a checkpoint"):
        command(None)
