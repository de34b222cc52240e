"""`apex eval` and `apex reference`: what they print, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apex_quant import embedded_model
from apex_quant.cli import run
from apex_quant.errors import UsageError
from tests.calibration.stock import TEXT

MODEL = str(embedded_model())
QUICK = ["--text", str(TEXT), "--ctx", "128", "--chunks", "2", "-j", "1"]


def test_reference_and_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored, out = tmp_path / "MODEL.apexref", tmp_path / "results.json"
    assert run(["reference", MODEL, "-o", str(stored), *QUICK, "--copy-output"]) == 0
    said = capsys.readouterr().out
    assert "126 scored tokens in 2 chunks" in said
    assert "rebuilt predictions: mean KLD" in said
    assert run(["eval", MODEL, "--reference", str(stored), "-o", str(out), "-j", "1"]) == 0
    said = capsys.readouterr().out
    for part in ("perplexity", "mean KLD", "126 tokens", "too few", "same top token", "routers differ most", "golden"):
        assert part in said, part
    assert run(["eval", MODEL, "--reference", str(stored), "-o", str(out), "-j", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(out.read_text())
    assert document["schema"] == "apex.results/1"
    assert document["metrics"]["kld"]["mean"]["n"] == 126
    assert document["per_token"]["path"] == "results.npz"


def test_reference_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "base.kld"
    assert run(["reference", MODEL, "-o", str(out), *QUICK, "--form", "stock", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["bytes"] == made["stock_bytes"] == out.stat().st_size
    assert made["form"] == "stock"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task-file", "hellaswag"], "not of the form NAME=FILE"),
        (["--task-file", "squad=x.txt"], "no metric is called 'squad'"),
        (["--only", "ppl,klt"], "Did you mean kld"),
        (["--tensor-split", "a"], "not a list of numbers"),
        (["--override-tensor", "x"], "REGEX=BUFFER"),
        (["--only", "kld"], "needs a reference"),
    ],
)
def test_wrong_usage(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(["eval", MODEL, "-o", str(tmp_path / "results.json"), *words])
