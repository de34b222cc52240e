"""`apex imatrix ...` and `apex quantize --fill`: what is printed, what is written, what is refused."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from apex_quant.cli import imatrix as command
from apex_quant.gguf import Value
from apex_quant.importance import Importance, fill
from apex_quant.importance.fill import DEFAULT_STRENGTH
from apex_quant.importance.report import FLOOR
from tests.helpers.cli import Ran
from tests.helpers.imatrix import random_imatrix

Call = Callable[..., Ran]
DOWN = "blk.1.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def thin(model: Path) -> Path:
    path = model.with_name("thin.gguf")
    random_imatrix(model, seed=3, uncovered={DOWN: [2]}, tokens=150).write(path)
    return path


def test_show(call: Call, matrix: Path, thin: Path) -> None:
    ran = call("imatrix", "show", thin)
    assert ran.status == 0
    assert ran.err == ""
    assert f"{thin}  gguf, raw, " in ran.out
    assert "blk.*.ffn_down_exps.weight" in ran.out
    assert "experts with fewer than 64 tokens" in ran.out
    assert DOWN not in ran.out
    assert DOWN in call("imatrix", "show", thin, "--entries").out
    document = call("imatrix", "show", thin, "--json").json
    assert {"layer": 1, "experts": [2]} in document["experts"]["uncovered"]
    with Importance.read(thin) as read:
        assert [row["name"] for row in document["entries"]] == list(read.entries)
        counts = read.entries[DOWN].counts
    (row,) = [row for row in document["entries"] if row["name"] == DOWN]
    assert (row["tokens_max"], row["uncovered"], row["experts"]) == (counts.max(), [2], 3)
    assert document["chunk_size"] == 512
    assert document["prior"] is None
    assert "every expert has at least 1 tokens" in call("imatrix", "show", matrix, "--floor", 1).out


def test_merge(call: Call, matrix: Path, thin: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.gguf"
    document = call("imatrix", "merge", matrix, thin, "-o", out, "--json").json
    assert document["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert (document["path"], document["bytes"], document["warnings"]) == (str(out), out.stat().st_size, [])
    with Importance.read(matrix) as a, Importance.read(thin) as b, Importance.read(out) as c:
        assert document["chunk_count"] == a.chunk_count + b.chunk_count == c.chunk_count
        assert document["entries"] == len(c.entries)
        assert (c.entries[DOWN].counts == a.entries[DOWN].counts + b.entries[DOWN].counts).all()
    ran = call("imatrix", "merge", matrix, thin, "-o", out)
    assert (ran.status, ran.out) == (2, "")
    assert "exists already" in ran.err
    assert call("imatrix", "merge", matrix, thin, "-o", out, "--force").status == 0


def test_diff(call: Call, matrix: Path, thin: Path) -> None:
    ran = call("imatrix", "diff", matrix, thin)
    assert ran.status == 0
    assert "entries have equal weights" in ran.out
    document = call("imatrix", "diff", matrix, thin, "--json").json
    (row,) = [row for row in document["entries"] if row["name"] == DOWN]
    assert (row["uncovered_a"], row["uncovered_b"]) == (0, 1)
    assert 0 < row["median"] <= row["max"] <= 1
    assert (document["only_a"], document["only_b"]) == ([], [])
    assert "0 differ" in call("imatrix", "diff", thin, thin).out


def test_convert(call: Call, thin: Path, tmp_path: Path) -> None:
    ran = call("imatrix", "convert", thin, "-o", tmp_path / "m.dat")
    assert ran.status == 0
    assert "warning: the legacy form does not hold token counts per expert" in ran.out
    assert call("imatrix", "convert", tmp_path / "m.dat", "-o", tmp_path / "m.gguf", "--json").json["warnings"] == []
    shown = call("imatrix", "show", tmp_path / "m.dat").out
    assert "dat, raw" in shown
    assert "no counts per expert" in shown
    ran = call("imatrix", "convert", thin, "-o", tmp_path / "m.txt")
    assert ran.status == 2
    assert "ends in .gguf" in ran.err


def test_fill(call: Call, thin: Path, tmp_path: Path) -> None:
    out = tmp_path / "filled.gguf"
    ran = call("imatrix", "fill", thin, "-o", out)
    assert ran.status == 0
    assert "filled: shrink K=64" in ran.out
    with Importance.read(thin) as raw, Importance.read(out) as made:
        assert made.weights(DOWN).tobytes() == fill(raw).weights(DOWN).tobytes()
    ran = call("imatrix", "fill", out, "-o", tmp_path / "again.gguf")
    assert ran.status == 3
    assert "is filled already" in ran.err
    assert not (tmp_path / "again.gguf").exists()
    assert call("imatrix", "merge", thin, out, "-o", tmp_path / "m.gguf").status == 3
    assert call("imatrix", "fill", thin, "-o", out, "--strength", "0", "--force").status == 2
    document = call("imatrix", "fill", thin, "-o", out, "--strength", "2.5", "--force", "--json").json
    assert document["prior"] == "shrink K=2.5"
    assert f"{out}  gguf, filled: shrink K=2.5" in call("imatrix", "show", out).out


def test_defaults_are_those_of_the_functions() -> None:
    """Written out in the command, so that --help costs no import of numpy."""
    assert inspect.signature(command.fill).parameters["strength"].default == DEFAULT_STRENGTH
    assert inspect.signature(command.show).parameters["floor"].default == FLOOR


def test_errors(call: Call, model: Path, thin: Path, tmp_path: Path) -> None:
    (tmp_path / "nul.gguf").write_bytes(bytes(1000))
    for words, status in (
        (["show", tmp_path / "none.gguf"], 3),
        (["show", model], 3),
        (["show", tmp_path / "nul.gguf"], 3),
        (["diff", thin, tmp_path / "nul.gguf"], 3),
        (["merge", thin, tmp_path / "nul.gguf", "-o", tmp_path / "o.gguf"], 3),
        (["convert", tmp_path / "nul.gguf", "-o", tmp_path / "o.dat"], 3),
        (["merge", "-o", tmp_path / "o.gguf"], 2),
        (["show"], 2),
        ([], 2),
    ):
        ran = call("imatrix", *words)
        assert ran.status == status, words
        if words:
            assert ran.err.startswith("error: ")
            assert ran.out == ""
    assert not list(tmp_path.glob("o.*"))


def test_names_are_shown_harmless(call: Call, tmp_path: Path) -> None:
    evil = "blk.0.[red]x[/]"
    for name, value in (("evil", 1.0), ("other", 2.0)):
        about: dict[str, Any] = {"datasets": ("\x1b]0;x",), "metadata": {"apex.prior": Value.string("\x1b[31m")}}
        Importance.from_arrays({evil: ([value], 1)}, **about).write(tmp_path / f"{name}.gguf")
    for words in (["show", "--entries"], ["diff", tmp_path / "other.gguf"]):
        ran = call("imatrix", words[0], tmp_path / "evil.gguf", *words[1:])
        assert ran.status == 0
        assert "\x1b" not in ran.out
        assert evil in ran.out


def test_quantize_takes_the_rule(call: Call, model: Path, thin: Path, tmp_path: Path) -> None:
    sizes = {}
    for rule in ("prior", "none"):
        words = ["--tier", "i-compact", "--imatrix", thin, "--fill", rule, "--json"]
        sizes[rule] = call("plan", model, *words).json["total_bytes"]
        made = call("quantize", model, *words, "-o", tmp_path / f"{rule}.gguf", "-j", 2).json["outputs"][0]
        assert made["bytes"] == sizes[rule]
        ran = call("verify", tmp_path / f"{rule}.gguf", "--source", model, "--imatrix", thin, "--all", "-j", 2)
        assert ran.status == 0
        assert ("shrink K=64" in ran.out) == (rule == "prior")
    ran = call("plan", model, "--tier", "i-compact", "--imatrix", thin, "--fill", "mean")
    assert ran.status == 2
    assert "choose prior or none" in ran.err
