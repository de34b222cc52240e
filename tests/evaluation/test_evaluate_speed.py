"""Speed and harness tasks as parts of an evaluation: asked for, kept, and not measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apex_quant import SessionOptions, embedded_model, evaluate
from apex_quant.cli import run
from apex_quant.errors import ResourceError, UsageError
from apex_quant.evaluation import evaluate as module
from apex_quant.evaluation.harness import HarnessPlan
from apex_quant.evaluation.results import load
from apex_quant.evaluation.speed import SpeedPlan

MODEL = embedded_model()
ONE = SessionOptions(threads=1)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of measure_speed, which then give this; `busy` of it can be changed."""
    calls: list[dict[str, Any]] = []
    answer = {"pp16": {"value": 100.0, "deviation": 1.0, "n": 2, "samples": [99.0, 101.0]}, "busy": False,
              "busy_note": None, "active_bytes_per_token": 1000}  # fmt: skip

    def measure(model: Path, **settings: Any) -> dict[str, Any]:
        calls.append({"model": model, **settings, "answer": answer})
        return dict(answer)

    monkeypatch.setattr(module, "measure_speed", measure)
    return calls


def test_measured_once(timed: list[dict[str, Any]], tmp_path: Path) -> None:
    """The same call finds its numbers; other settings, or a machine that was busy, are measured again."""
    out, plan = tmp_path / "results.json", SpeedPlan(prompts=(16,), generate=(4,), repetitions=2)
    for _ in range(2):
        made = evaluate(MODEL, only=[], speed=plan, out=out, options=ONE)
    assert len(timed) == 1
    assert (timed[0]["prompts"], timed[0]["generate"], timed[0]["repetitions"]) == ((16,), (4,), 2)
    assert made.metrics["speed"]["pp16"]["value"] == 100.0
    assert made.warnings == []
    evaluate(MODEL, only=[], speed=SpeedPlan(prompts=(32,)), out=out, options=ONE)
    assert len(timed) == 2
    timed[0]["answer"].update(busy=True, busy_note="other processes used 50% of the processors")
    for count in (3, 4):
        made = evaluate(MODEL, only=[], speed=plan, out=out, options=ONE)
        assert len(timed) == count
    assert "other processes" in made.warnings[0]


def test_really(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    words = ["eval", str(MODEL), "-p", "16", "-n", "4", "-d", "0,8", "--repetitions", "2", "-j", "1", "-o", str(out)]
    assert run([*words, "--only", "speed"]) == 0
    said = capsys.readouterr().out
    for part in ("pp16@d8", "tg4", "tokens/s", "of weights a token"):
        assert part in said, part
    speed = json.loads(out.read_text())["metrics"]["speed"]
    assert {"pp16", "tg4", "pp16@d8", "tg4@d8"} <= set(speed)
    assert speed["tg4"]["n"] == 2
    assert "-p 16 -n 4 -d 0,8 -r 2 -t 1" in speed["like"]


def test_harness_tasks_are_kept_one_by_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was answered before the server died is there, and is not asked again."""
    out, asked = tmp_path / "results.json", []

    def ask(model: Path, tasks: list[str], *, on_result: Any, **settings: Any) -> None:
        asked.append((list(tasks), settings["limit"], settings["allow_code"]))
        on_result(tasks[0], {"value": 0.5, "error": 0.1, "n": 4, "low": 0.1, "high": 0.9, "harness": "0.4.13"})
        if len(tasks) > 1:
            raise ResourceError("the server ended")

    monkeypatch.setattr(module, "run_harness", ask)
    monkeypatch.setattr(module, "find_lm_eval", lambda: ("lm_eval",))  # looked for before anything is measured
    plan = HarnessPlan(("gsm8k", "ifeval"), limit=4)
    with pytest.raises(ResourceError, match="the server ended"):
        evaluate(MODEL, only=[], harness=plan, out=out, options=ONE)
    assert load(out).metrics["gsm8k"]["value"] == 0.5
    assert set(evaluate(MODEL, only=[], harness=plan, out=out, options=ONE).metrics) == {"gsm8k", "ifeval"}
    evaluate(MODEL, only=[], harness=plan, out=out, options=ONE)
    assert asked == [(["gsm8k", "ifeval"], 4, False), (["ifeval"], 4, False)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "many"], "--prompts 'many' is not a list of whole numbers"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-n", "-4"], "at least one token"),
        (["--harness", "gsm8"], "Did you mean gsm8k"),
        (["--limit", "3"], "none is named"),
        (["--only", "speed", "--harness", "humaneval"], "humaneval would run programs"),
    ],
)
def test_wrong_usage(words: list[str], message: str, timed: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(["eval", str(MODEL), "-o", str(tmp_path / "results.json"), *words])
