"""Hostile files at the command line: exit status 3 and one line, and nothing of them reaches the terminal raw."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from apex_quant.gguf import open_model
from tests.attacks.builder import ATTACKS, SHARDS, THINGS, write
from tests.attacks.test_fuzz import SEEDS, mutate
from tests.cli.conftest import Call
from tests.helpers.cli import Ran, apex

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(result: Ran) -> Ran:
    """No traceback, no control characters but line ends, at most one error and one hint."""
    assert "Traceback" not in result.err
    assert not CONTROL.search(result.out), CONTROL.search(result.out)
    assert not CONTROL.search(result.err), CONTROL.search(result.err)
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (result.status != 0)
    return result


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str, call: Call, tmp_path: Path) -> None:
    attack = ATTACKS[name]
    path = write(attack, tmp_path / "x.gguf")
    huge = attack.size is not None
    for words in (
        ["inspect", path, "--tensors"],
        ["plan", path, "--tier", "quality"],
        ["verify", path],
        ["diff", path, path, "--headers-only"],
        ["quantize", path, "--tier", "Q8_0", "-o", tmp_path / "out"],
    ):
        if huge and attack.says is None and words[0] not in ("inspect", "plan"):
            continue  # legal, and terabytes to read
        result = clean(call(*words))
        if attack.says is not None:
            assert result.status == 3
        else:
            assert result.status in (0, 2, 3)
    assert not list(tmp_path.glob("out/*.gguf")) or attack.says is None


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(4))
def test_mutations(chunk: int, call: Call, model: Path, tmp_path: Path) -> None:
    """2,500 mutated and truncated files each, small made-up ones and a real model's header: no traceback, no hang."""
    pick, statuses = random.Random(chunk), Counter[int]()
    whole = model.read_bytes()
    with open_model(model) as opened:
        seeds = [*SEEDS, whole[: opened.files[0].header_bytes + 4096], whole[:4096]]
    commands: list[list[object]] = [["inspect"], ["inspect", "--tensors"], ["plan", "--tier", "quality"], ["verify"]]
    path = tmp_path / "x.gguf"
    for number in range(2500):
        path.write_bytes(mutate(pick.choice(seeds), pick))
        name, *options = commands[number % len(commands)]
        result = clean(call(name, path, *options))
        assert result.status in (0, 2, 3), result.err
        statuses[result.status] += 1
    assert min(statuses[0], statuses[3]) > 100


@pytest.mark.parametrize("name", SHARDS)
def test_shards(name: str, call: Call, tmp_path: Path) -> None:
    files, opened, says = SHARDS[name]
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    for words in (["inspect", tmp_path / opened], ["merge", tmp_path / opened, "-o", tmp_path / "out.gguf"]):
        result = clean(call(*words))
        assert result.status == 3 if says is not None else result.status in (0, 3)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", THINGS)
def test_things(name: str, call: Call, tmp_path: Path, model: Path) -> None:
    """A folder, a fifo, /dev/zero: as model, as matrix, as recipe, as tier file."""
    path = tmp_path / "x.gguf"
    THINGS[name](path)
    assert clean(call("inspect", path)).status == 3
    assert clean(call("plan", model, "--tier", "quality", "--imatrix", path)).status == 3
    assert clean(call("plan", model, "--like", path)).status == 3
    assert clean(call("verify", model, "--source", path)).status == 3
    if name != "fifo":  # text files are opened as any program does
        assert clean(call("plan", model, "--tier", "quality", "--recipe", path)).status == 3
    toml = tmp_path / "t.toml"
    if name not in ("fifo", "/dev/zero"):
        THINGS[name](toml)
        assert clean(call("plan", model, "--tier", toml)).status == 3


TEXTS = [
    "\x1b[31mred\x07\x1b]0;title\x07",
    "[red]x[/red]",
    "[/]",
    ":smile:",
    "a\nerror: fake\rb",
    "\u202eevil",
    "\\",
    "[bold",
]


def write_names(path: Path, texts: list[str]) -> Path:
    """A model whose metadata and tensor names are these texts, as far as a name may hold them."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(texts[0])
    for number, text in enumerate(texts):
        writer.add_string(f"text.{number}", text)
        writer.add_array(f"texts.{number}", [text, "b"])
        if text.isprintable():
            writer.add_string(f"key.{text}", "x")
    writer.add_uint32("llama.block_count", 1)
    writer.add_uint32("llama.embedding_length", 256)
    for text in texts:
        if text.isprintable():
            writer.add_tensor(f"blk.0.{text}.weight", np.ones((2, 256), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("first", TEXTS)
def test_texts(first: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Markup is shown and not obeyed, control characters are shown escaped."""
    texts = [first, *(text for text in TEXTS if text != first)]
    path = write_names(tmp_path / "m.gguf", texts)
    other = write_names(tmp_path / "o.gguf", [text + "!" for text in texts])
    for words in (
        ["inspect", path, "--tensors", "--stats"],
        ["plan", path, "--tier", "quality"],
        ["plan", path, "--tier", "Q4_K_M"],
        ["diff", path, other, "--values"],
        ["verify", path],
        ["verify", path, "--source", other],
    ):
        result = clean(call(*words))
        assert result.status in (0, 2, 3), result.err
        if words[0] in ("inspect", "diff"):
            assert result.status == 0, result.err
            for text in TEXTS:
                if text.isprintable():
                    assert f"blk.0.{text}.weight" in result.out
        as_json = call(*words, "--json")
        if as_json.status == 0:
            assert json.loads(as_json.out)
            assert as_json.out.isascii()


def test_texts_on_a_terminal(tmp_path: Path) -> None:
    """With colours on: the only escape sequences are our own."""
    path = write_names(tmp_path / "[red]m.gguf", TEXTS)
    result = apex("inspect", path, "--tensors", FORCE_COLOR="1", TERM="xterm-256color", COLUMNS="300")
    assert result.status == 0, result.err
    bare = re.sub(r"\x1b\[[0-9;]*m", "", result.out)
    assert not CONTROL.search(bare)
    assert "\x1b[31m" not in result.out
    for text in TEXTS:
        if text.isprintable():
            assert f"blk.0.{text}.weight" in bare


def test_progress_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor and file names are no markup there either; '[/]' would be an error."""
    import io
    import sys

    from apex_quant.cli.progress import JobBar
    from apex_quant.encode.job import JobProgress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "250")
    with JobBar("quantizing [/] \x1b[31m[red]") as bar:
        for text in TEXTS:
            bar(JobProgress("encode", 1.0, 2.0, 1, 2, f"blk.[/].{text}"))
            assert bar._bar is not None
            bar._bar.refresh()
    shown: Any = sys.stderr
    text = shown.getvalue()
    assert "quantizing [/] \\x1b[31m[red] (encode)" in text
    assert "\x1b[31mred" not in text
    assert "\x07" not in text
    assert "blk.[/].[red]x[/red]" in text


def test_damage_while_reading(call: Call, model: Path, tmp_path: Path) -> None:
    """Truncated in the data: every command that reads it says so."""
    path = tmp_path / "m.gguf"
    path.write_bytes(model.read_bytes()[:-5000])
    for words in (["inspect", path], ["verify", path], ["quantize", path, "--tier", "Q8_0", "-o", tmp_path]):
        result = clean(call(*words))
        assert result.status == 3
        assert "m.gguf" in result.err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "x=y=z",
        "a=Q4_K b",
        "(=Q4_K",
        "=Q4_K",
        "{",
        '{"types": 3}',
        "[1]",
        "\x00",
        "a" * 100000,
        "é=Q4_K",
        "\ud800",
    ],
)
def test_recipes(text: str, call: Call, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    result = clean(call("plan", model, "--tier", "quality", "--recipe", path))
    assert result.status == (0 if text == "é=Q4_K" else 3)


@pytest.mark.parametrize(
    "text",
    [
        "", "x", "name = 3", 'name = "x"', '[[tier]]\nname = "a"', "tier = 3", "tier = [1]", "\x00",
        "a = " + "[" * 2000,
        'name = "\\u001b[31m"\nbase = "Q4_K_M"\nrouted = "Q4_K"\nshared = "Q4_K"\nattention = "Q4_K"',
    ],
)  # fmt: skip
def test_tier_files(text: str, call: Call, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    assert clean(call("plan", model, "--tier", path)).status == 3
