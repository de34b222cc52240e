"""`apex compare` and `apex results`: documents, tables, sentences, exit statuses."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

from apex_quant.cli import results as command
from apex_quant.cli.app import app
from apex_quant.evaluation.compare import compare
from apex_quant.evaluation.results import load, update
from tests.evaluation.synthetic import task_arrays, write
from tests.helpers.cli import Ran

Call = Callable[..., Ran]

PAIR_KEYS = {"a", "b", "metric", "difference", "low", "high", "n", "verdict"}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [write(tmp_path, name, scale=scale, seed=i) for i, (name, scale) in enumerate([("a", 0.8), ("b", 1.0)])]
    for i, path in enumerate(made):
        update(path, "ppl", {"value": 6.5 + i, "error": 0.04, "n": 1240})
        update(path, "hellaswag", {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100}, arrays=task_arrays(np.ones(100)))
        update(path, "speed", {"pp512": {"value": 100.5, "deviation": 1.0, "n": 5}, "tg128": {"value": 12.5, "n": 5}})
    return made


def test_compare(call: Call, files: list[Path]) -> None:
    document = call("compare", *files, "--json").json
    assert list(document) == ["pairs"]
    assert [pair["metric"] for pair in document["pairs"]] == ["kld", "p99_9", "top1_agreement", "ppl", "hellaswag"]
    assert all(set(pair) >= PAIR_KEYS for pair in document["pairs"])
    assert {pair["verdict"] for pair in document["pairs"]} <= {"a_lower", "b_lower", "no_difference_shown"}
    shown = call("compare", *files)
    assert (shown.status, shown.err) == (0, "")
    for pair in document["pairs"]:
        assert pair["sentence"] in shown.out
    assert re.search(r"^a has lower mean KLD than b by .* on 1,240 tokens$", shown.out, re.MULTILINE)
    rows = [line.split() for line in shown.out.splitlines() if line.startswith("a  b  ")]
    better = {row[2]: row[-1] for row in rows}  # of the share that is the same, more is better
    assert {pair["better_result"] or "shown" for pair in document["pairs"] if pair["metric"] == "top1_agreement"} == {
        better["top1_agreement"]
    }
    assert better["kld"] == "a"
    assert "_lower" not in shown.out
    assert "4 intervals at 95 % each" in shown.out
    some = call("compare", *files, *files, "--metric", "kld,ppl", "--metric", "hellaswag", "--all-pairs", "--json").json
    assert len(some["pairs"]) == 6 * 3


def test_results(call: Call, files: list[Path], tmp_path: Path) -> None:
    document = call("results", tmp_path, "--json").json
    assert [row["path"] for row in document["results"]] == [str(path) for path in files]
    assert document["results"][0]["metrics"]["ppl"]["value"] == 6.5
    assert (document["passed_over"], document["merged"]) == ([], None)
    (tmp_path / "recipe.json").write_text("{}")
    shown = call("results", tmp_path)
    assert (shown.status, shown.err) == (0, "")
    assert re.search(r"^a +1\.00 kB +4\.5 +6\.5 +0\.04 .* 50\.00 % +100\.5 +12\.5 +a\.json$", shown.out, re.MULTILINE)
    assert "not results: recipe.json" in shown.out


def test_results_of_little(call: Call, tmp_path: Path) -> None:
    """A file with nothing but a name, and one from elsewhere with other types where they are free."""
    (tmp_path / "a.json").write_text(json.dumps({"schema": "apex.results/1", "model": {"path": "[bold]\x1b[31m.gguf"}}))
    metrics: dict[str, Any] = {"kld": {"max": {"value": "x"}}, "speed": {"pp": None, "tg": 5}, "mmlu": {}}
    document = {"schema": "apex.results/1", "model": {"path": "b"}, "metrics": metrics}
    (tmp_path / "b.json").write_text(json.dumps(document))
    shown = call("results", tmp_path)
    assert (shown.status, shown.err) == (0, "")
    assert "[bold]\\x1b[31m" in shown.out
    assert "\x1b" not in shown.out


def test_merge(call: Call, files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "m" / "all.json"
    out.parent.mkdir()
    document = call("results", files[0], files[0], "--merge", out, "--json").json
    assert document["merged"] == {"path": str(out), "warnings": []}
    assert load(out).arrays().keys() == load(files[0]).arrays().keys()
    again = call("results", files[0], "--merge", out)
    assert again.status == 2
    assert re.search("hint: .*--force", again.err)
    assert "merged into" in call("results", files[0], "--merge", out, "--force").out


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["compare", "A"], 2, "two results or more"),
        (["compare", "A", "B", "--metric", "klt"], 2, "no numbers for 'klt'.*Did you mean kld"),
        (["compare", "A", "B", "--level", "1.5"], 2, "not a level"),
        (
            ["compare", "A", "B", "--level", "0.9999"],
            2,
            "2000 draws are too few .* at least 20,000",
        ),
        (["compare", "A", "none.json"], 3, "No such file"),
        (["compare", "A", "A.npz"], 3, "not a whole JSON document"),
        (["results", "none.json"], 3, "No such file"),
        (["results", "A", "B", "--merge", "OUT"], 3, "results of different models"),
    ],
)
def test_errors(words: list[str], status: int, says: str, call: Call, files: list[Path], tmp_path: Path) -> None:
    named = {"A": files[0], "B": files[1], "A.npz": files[0].with_suffix(".npz"), "OUT": tmp_path / "o.json"}
    ran = call(*[named.get(word, word) for word in words])
    assert (ran.status, ran.out) == (status, "")
    assert ran.err.startswith("error: ")
    assert re.search(says, ran.err)
    assert not (tmp_path / "o.json").exists()


def test_defaults_are_those_of_the_function() -> None:
    options = inspect.signature(command.compare).parameters
    for name, parameter in inspect.signature(compare).parameters.items():
        if name in options and parameter.default is not inspect.Parameter.empty:
            assert options["metric" if name == "metrics" else name].default == parameter.default


def test_help(call: Call) -> None:
    group: Any = typer.main.get_command(app)
    for name in ("compare", "results"):
        assert call(name, "--help").status == 0
        for parameter in group.commands[name].params:
            assert parameter.help or parameter.name == "help"


def test_import(call: Call, tmp_path: Path) -> None:
    """Others' results become files like ours, and none that is there is lost."""
    log, out = tmp_path / "theirs.csv", tmp_path / "out"
    log.write_text("name,size_gib,kld,ppl\nM-Q4_K_M.gguf,12.5,0.0214,6.56\nM-Q6_K.gguf,20,0.002,6.54\n")
    made = call("results", log, "--import", out, "--json").json
    assert [(row["name"], row["metrics"]["kld"]["mean"]["value"]) for row in made["results"]] == [
        ("M-Q4_K_M", 0.0214), ("M-Q6_K", 0.002),
    ]  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == ["M-Q4_K_M.json", "M-Q6_K.json"]
    assert "exists already" in call("results", log, "--import", out).err
    assert call("results", log, "--import", out, "--force").status == 0
    (tmp_path / "x.txt").write_text("nothing")
    assert "nothing that can be imported" in call("results", tmp_path / "x.txt", "--import", out).err
