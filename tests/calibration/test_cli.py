"""`apex calibrate`: its JSON, what it tells people, and words that are no numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from apex_quant import embedded_model
from apex_quant.cli.calibrate import parse_count
from apex_quant.errors import UsageError
from apex_quant.importance import Importance
from tests.calibration.stock import TEXT
from tests.helpers.cli import apex


def test_json_and_text(tmp_path: Path) -> None:
    words: list[str | Path] = ["calibrate", embedded_model(), "-o", "i.gguf", "--corpus", TEXT]
    words += ["--ctx", "64", "-j", "1", "--tokens", "600"]
    made = apex(*words, "--json", cwd=tmp_path)
    assert made.status == 0, made.err
    document = json.loads(made.out)
    assert document["path"] == "i.gguf"
    assert (document["tokens"], document["chunks"]) == (576, 9)
    rows = document["experts"]["uncovered"]
    assert all(row.keys() == {"layer", "experts", "tokens"} for row in rows)
    assert document["experts"]["number"] == 72
    with Importance.read(tmp_path / "i.gguf") as matrix:
        assert (matrix.chunk_count, matrix.chunk_size) == (9, 64)
    again = apex(*words, cwd=tmp_path)
    assert "576 tokens in 9 chunks, unchanged" in again.out
    other = apex(*words[:-1], "300", cwd=tmp_path)
    assert (other.status, "--force" in other.err) == (2, True)
    short = apex(*words[:2], "-o", "none.gguf", "--corpus", TEXT, "--ctx", "8192", cwd=tmp_path)
    assert short.status == 3
    assert "less than one context of 8192" in short.err
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


@pytest.mark.parametrize(("text", "number"), [("50k", 50_000), ("1.5M", 1_500_000), ("8192", 8192), ("2K", 2000)])
def test_counts(text: str, number: int) -> None:
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "k", "0", "-5", "5kb", "1e9"])
def test_no_counts(text: str) -> None:
    with pytest.raises(UsageError, match="not a number of tokens"):
        parse_count(text)
