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
from typing import Any

import pytest

from apex_quant import convert as module
from apex_quant.cache import cache_folder
from apex_quant.checkpoint import describe
from apex_quant.cli.convert import convert as command
from apex_quant.cli.convert import convert_mlx as mlx_command
from apex_quant.convert import convert
from apex_quant.converter_python import VARIABLE, ConverterPython, find_python, probe, set_up
from apex_quant.converter_source import SDIST_SHA256, Converter, find_converter, unpack
from apex_quant.errors import ApexError, InputError, NativeError, ResourceError, UsageError
from apex_quant.hub import HubProgress
from apex_quant.mlx import convert_mlx
from apex_quant.version import LIBRARY_VERSION
from tests.convert.fake_sdist import unpacked, write_sdist
from tests.convert.test_checkpoint import make
from tests.helpers.random_models import write_random_gguf
from tests.hub.conftest import hub, waits  # noqa: F401 -- fixtures
from tests.hub.mock import MockHub, Repo

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
    events: list[Any] = []
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


def upload(server: MockHub, checkpoint: Path, **more: bytes) -> None:
    """The checkpoint, what other programs read, and `more` by path, as a repository."""
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    other = ("consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "original/model-1.pth")
    files |= dict.fromkeys((*other, "Name-Q4_K_M.gguf", "onnx/model.onnx"), b"never asked for")
    server.repos["org/Name-1B"] = Repo(files=files | more)


@pytest.fixture
def from_hub(checkpoint: Path, hub: MockHub, monkeypatch: pytest.MonkeyPatch) -> MockHub:  # noqa: F811
    """A hub with the checkpoint; the stand-in for the converter finds what it copies."""
    shutil.copyfile(checkpoint / "result.gguf", checkpoint / "result.json")
    upload(hub, checkpoint)
    script = Path(os.environ["LLAMA_CPP_DIR"]) / "convert_hf_to_gguf.py"
    script.write_text(script.read_text().replace("result.gguf", "result.json"))
    return hub


@pytest.mark.usefixtures("waits")
def test_a_hub_id_is_downloaded(from_hub: MockHub, checkpoint: Path) -> None:
    """What a conversion reads, of one commit and of the better form, with progress; nothing else."""
    events: list[Any] = []
    made = convert("org/Name-1B", revision="v1", progress=events.append)
    assert made.path.name == "Name-1B-BF16.gguf"
    commit = from_hub.repos["org/Name-1B"].commit
    assert made.checkpoint.path.name == commit
    came = {path.name for path in made.checkpoint.path.rglob("*") if path.is_file()}
    assert came == {path.name for path in checkpoint.iterdir()} - {"result.gguf"}
    assert from_hub.count(r"GET /api/models") == 1
    downloads = [event for event in events if isinstance(event, HubProgress)]
    assert downloads[-1].done == downloads[-1].total > 0


@pytest.mark.usefixtures("waits")
def test_parts_in_folders_and_names_that_only_an_index_knows(from_hub: MockHub, checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    for number in (1, 2):
        (checkpoint / f"model-0000{number}-of-00002.safetensors").rename(checkpoint / f"pytorch_{number}.safetensors")
    names = {name: "pytorch_" + file[10] + ".safetensors" for name, file in index["weight_map"].items()}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    upload(from_hub, checkpoint, **{"1_Dense/model.safetensors": b"dense"})
    made = convert("org/Name-1B")
    assert made.checkpoint.shards == ("pytorch_1.safetensors", "pytorch_2.safetensors")
    assert (made.checkpoint.path / "1_Dense/model.safetensors").read_bytes() == b"dense"


@pytest.mark.usefixtures("waits")
def test_no_weight_of_what_cannot_be_converted_is_downloaded(from_hub: MockHub) -> None:
    files = from_hub.repos["org/Name-1B"].files
    config = json.loads(files["config.json"])
    kept = dict(files)
    files["config.json"] = json.dumps({**config, "architectures": ["OtherForCausalLM"]}).encode()
    with pytest.raises(InputError, match=r"org/Name-1B: .* does not convert OtherForCausalLM"):
        convert("org/Name-1B")
    files |= kept
    del files["model-00002-of-00002.safetensors"]
    with pytest.raises(InputError, match=r"org/Name-1B: model-00002-of-00002\.safetensors is not there"):
        convert("org/Name-1B")
    del files["config.json"]
    for command_ in (convert, lambda name: convert_mlx(name, "out")):
        with pytest.raises(InputError, match=r"org/Name-1B: holds no config\.json"):
            command_("org/Name-1B")
    assert from_hub.count(r"GET .*(safetensors|bin|pth|gguf|onnx)$") == 0


@pytest.mark.usefixtures("waits")
def test_mlx_downloads_the_same(from_hub: MockHub) -> None:
    mlx_command("org/Name-1B", Path("out"), predicate_only=True)
    assert from_hub.count(r"resolve/\w+/(consolidated|adapter|pytorch|original|onnx|Name)") == 0
    assert from_hub.count(r"GET .*model-0000[12]-of-00002\.safetensors") == 2


@pytest.mark.parametrize("mmproj", [False, True])
def test_without_nextn(checkpoint: Path, mmproj: bool) -> None:
    """Left out of the architectures that let it; all others, and projectors, are converted as they are."""
    config = {"vision_config": {"depth": 1}, "architectures": ["Qwen3VLForConditionalGeneration"]} if mmproj else {}
    make(checkpoint, config, mtp__fc__weight=(2, 2))
    for nextn in (True, False):
        lines: list[str] = []
        convert(checkpoint, "x.gguf", nextn=nextn, mmproj=mmproj, say=lines.append, force=True)
        assert f"no_mtp={not nextn and not mmproj}" in lines
    table = Path(os.environ["LLAMA_CPP_DIR"]) / "conversion/__init__.py"
    table.write_text(table.read_text().replace("not mmproj", "False"))
    write_random_gguf(
        checkpoint / "result.gguf", "qwen3moe", layers="MM", metadata={"qwen3moe.nextn_predict_layers": 1}
    )
    made = convert(checkpoint, "x.gguf", nextn=False, mmproj=mmproj, force=True)
    assert any("the NextN blocks are kept" in warning for warning in made.warnings)


def test_an_old_checkout_is_asked_itself(checkpoint: Path) -> None:
    """Without a package of classes there is only the script's own option."""
    shutil.rmtree(Path(os.environ["LLAMA_CPP_DIR"]) / "conversion")
    with pytest.raises(InputError, match="no-nextn are not supported"):
        convert(checkpoint, "x.gguf", nextn=False)
    convert(checkpoint, "x.gguf")


PYTHON = """#!/bin/sh
case "$*" in
  *" venv "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python";;
  *" pip "*) [ -z "$PYTHONPATH" ] || { echo "error: satisfied by $PYTHONPATH"; exit 1; };;
  *) echo '{"sys": "1"}';;
esac
"""


def test_setting_up_sees_no_other_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip takes as there already because of PYTHONPATH, the converter would not find."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", "/some/modules")
    assert set_up(say=lambda _: None).versions == {"sys": "1"}


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
    for source, more in (
        ("org/Name-1B", {}),
        (str(checkpoint), {"revision": "v1"}),
        (str(checkpoint), {"setup": True}),
    ):
        with pytest.raises(UsageError, match="--describe looks at a directory that is there"):
            command(source, describe=True, **more)
